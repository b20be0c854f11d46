//! [`Etcd`]: a real etcd.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::child::{Folder, Server, free_ports};
use super::version::EtcdVersion;

/// How an [`Etcd`] is started.
#[derive(Debug, Clone, Default)]
pub struct EtcdOptions {
    /// Which etcd.
    pub version: EtcdVersion,
    /// Its certificate, its key, and the authority of the clients' certificates if it asks for
    /// those: then it speaks TLS.
    pub tls: Option<(PathBuf, PathBuf, Option<PathBuf>)>,
    /// More flags.
    pub flags: Vec<String>,
}

/// A server of etcd on the loopback interface: one by itself, or a member of a cluster. Dropping it
/// ends it and removes its data.
#[derive(Debug)]
pub struct Etcd {
    options: EtcdOptions,
    folder: Folder,
    port: u16,
    peer_port: u16,
    /// The peer ports of all members, its own included.
    members: Vec<u16>,
    server: Option<Server>,
}

/// The longest that a server may take to listen.
const START: Duration = Duration::from_secs(30);

impl Etcd {
    /// Starts the one in the path with the usual settings, and waits until it listens.
    ///
    /// # Errors
    /// There is no such program ([`io::ErrorKind::NotFound`]), or it did not start; its last words
    /// are in the error.
    pub fn start() -> io::Result<Self> {
        Self::with(EtcdOptions::default())
    }

    /// Starts one, and waits until it listens.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn with(options: EtcdOptions) -> io::Result<Self> {
        let mut last = io::Error::other("not tried");
        // A port that was free may be taken when it is used.
        for _ in 0..5 {
            match Self::try_cluster(&options, 1) {
                Ok(mut members) => return members.pop().ok_or(last),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Starts a cluster of so many members, and waits until each listens. It may still be choosing a
    /// leader then.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn cluster(version: EtcdVersion, members: usize) -> io::Result<Vec<Self>> {
        let options = EtcdOptions {
            version,
            ..EtcdOptions::default()
        };
        Self::try_cluster(&options, members)
    }

    fn try_cluster(options: &EtcdOptions, count: usize) -> io::Result<Vec<Self>> {
        let ports = free_ports(2 * count)?;
        let (ports, peer_ports) = ports.split_at(count);
        let mut members = Vec::new();
        for (port, peer_port) in ports.iter().zip(peer_ports) {
            let mut etcd = Self {
                options: options.clone(),
                folder: Folder::new("etcd")?,
                port: *port,
                peer_port: *peer_port,
                members: peer_ports.to_vec(),
                server: None,
            };
            etcd.restart()?;
            members.push(etcd);
        }
        Ok(members)
    }

    /// Starts one of a release with the usual settings, and waits until it listens.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn of(version: EtcdVersion) -> io::Result<Self> {
        Self::with(EtcdOptions {
            version,
            ..EtcdOptions::default()
        })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), self.port)
    }

    /// The endpoint: `http://127.0.0.1:PORT`, or `https://`.
    pub fn endpoint(&self) -> String {
        let scheme = self.options.tls.as_ref().map_or("http", |_| "https");
        format!("{scheme}://{}", self.address())
    }

    /// The folder of its data.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// A folder beside its data, removed with it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts it again with the data it has, and waits until it listens.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    #[allow(
        clippy::disallowed_methods,
        reason = "a server takes as long as it takes"
    )]
    pub fn restart(&mut self) -> io::Result<()> {
        self.kill();
        let endpoint = self.endpoint();
        let url = |port: &u16| format!("http://127.0.0.1:{port}");
        let peer = url(&self.peer_port);
        let name = |port: &u16| format!("n{port}");
        let members = self.members.iter();
        let members: Vec<String> = members
            .map(|port| format!("{}={}", name(port), url(port)))
            .collect();
        let data = self.data();
        let mut args: Vec<String> = [
            ("--name", name(&self.peer_port)),
            ("--data-dir", data.to_string_lossy().into_owned()),
            ("--listen-client-urls", endpoint.clone()),
            ("--advertise-client-urls", endpoint),
            ("--listen-peer-urls", peer.clone()),
            ("--initial-advertise-peer-urls", peer.clone()),
            ("--initial-cluster", members.join(",")),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect();
        if let Some((certificate, key, clients)) = &self.options.tls {
            let text = |path: &PathBuf| path.to_string_lossy().into_owned();
            args.extend(["--cert-file".to_owned(), text(certificate)]);
            args.extend(["--key-file".to_owned(), text(key)]);
            if let Some(ca) = clients {
                args.push("--client-cert-auth".to_owned());
                args.extend(["--trusted-ca-file".to_owned(), text(ca)]);
            }
        }
        args.extend(self.options.flags.iter().cloned());
        let program = self.options.version.program();
        let log = self.folder.path().join("log");
        let mut server = Server::start(&program.to_string_lossy(), args, &log)?;
        let begun = std::time::Instant::now();
        while TcpStream::connect(self.address()).is_err() {
            server.check()?;
            if begun.elapsed() > START {
                return Err(io::Error::other("etcd does not listen"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        server.check()?;
        self.server = Some(server);
        Ok(())
    }

    /// Starts it again without the data it had, as after its disk was lost, and waits until it
    /// listens.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub fn restart_empty(&mut self) -> io::Result<()> {
        self.kill();
        std::fs::remove_dir_all(self.data())?;
        self.restart()
    }

    /// Ends it at once, as a power cut does. Its data stay.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Ends it, and leaves the folder of its data behind: `etcd --data-dir` goes on with that.
    pub fn keep(mut self) -> PathBuf {
        self.kill();
        self.folder.keep().join("data")
    }

    /// Freezes it: its connections stay open, and nothing is answered.
    pub fn freeze(&self) {
        if let Some(server) = &self.server {
            server.signal(Signal::SIGSTOP);
        }
    }

    /// Ends a freeze.
    pub fn thaw(&self) {
        if let Some(server) = &self.server {
            server.signal(Signal::SIGCONT);
        }
    }
}
