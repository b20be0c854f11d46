//! [`Etcd`]: a real etcd.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::child::{Folder, Server, free_port};

/// How an [`Etcd`] is started.
#[derive(Debug, Clone, Default)]
pub struct EtcdOptions {
    /// The program; `etcd` in the path unless given.
    pub program: Option<PathBuf>,
    /// Its certificate, its key, and the authority of the clients' certificates if it asks for
    /// those: then it speaks TLS.
    pub tls: Option<(PathBuf, PathBuf, Option<PathBuf>)>,
    /// More flags.
    pub flags: Vec<String>,
}

/// A server of etcd with one member, on the loopback interface. Dropping it ends it and removes its
/// data.
#[derive(Debug)]
pub struct Etcd {
    options: EtcdOptions,
    folder: Folder,
    port: u16,
    peer_port: u16,
    server: Option<Server>,
}

/// The longest that a server may take to listen.
const START: Duration = Duration::from_secs(30);

impl Etcd {
    /// Starts one with the usual settings, and waits until it listens.
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
            let mut etcd = Self {
                options: options.clone(),
                folder: Folder::new("etcd")?,
                port: free_port()?,
                peer_port: free_port()?,
                server: None,
            };
            match etcd.restart() {
                Ok(()) => return Ok(etcd),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
                Err(error) => last = error,
            }
        }
        Err(last)
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
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let data = self.data();
        let mut args: Vec<String> = [
            ("--name", "n".to_owned()),
            ("--data-dir", data.to_string_lossy().into_owned()),
            ("--listen-client-urls", endpoint.clone()),
            ("--advertise-client-urls", endpoint),
            ("--listen-peer-urls", peer.clone()),
            ("--initial-advertise-peer-urls", peer.clone()),
            ("--initial-cluster", format!("n={peer}")),
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
        let program = self.options.program.as_ref();
        let program = program.map_or_else(|| "etcd".into(), |path| path.to_string_lossy());
        let log = self.folder.path().join("log");
        let mut server = Server::start(&program, args, &log)?;
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
