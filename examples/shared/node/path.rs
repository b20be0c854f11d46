//! The packet path of a backend that has one in user space: taken over from the program that had it
//! before, handed over to the next, and kept meanwhile by a process that does nothing else.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use flannel::udp::{HandoverError, Options};
use flannel::{Forwarders, InNamespace, NodeId, PacketPath, error_chain};

use super::{Common, End, Error};

/// Where namespaces have their names.
const NAMED: &str = "/run/netns";
/// How often a keeper looks whether the namespace of its device is still wanted.
const LOOK: Duration = Duration::from_secs(1);

/// The packet paths of this process, and where they are handed over.
pub(crate) struct Paths {
    pub(crate) forwarders: Forwarders,
    /// Whether they came from another process.
    pub(crate) are_taken: bool,
    /// The process that listened there is to be replaced: the operator named the socket.
    pub(crate) replaces: bool,
    is_named: bool,
    socket: PathBuf,
    listener: Option<UnixListener>,
    /// What a keeper is told of the node.
    node: Vec<OsString>,
}

impl Paths {
    /// Takes over what another process of this node has; else there is none yet.
    pub(crate) fn find(flags: &Common, node: &NodeId) -> Result<Self, End> {
        let mut this = Self {
            forwarders: Forwarders::default(),
            are_taken: false,
            replaces: false,
            is_named: flags.handover.is_some(),
            socket: socket(flags, node),
            listener: None,
            node: vec!["--node".into(), node.to_string().into()],
        };
        let lab = flags.lab.iter().flat_map(|lab| ["--lab", lab]);
        this.node.extend(lab.map(OsString::from));
        this.node.push("--handover".into());
        this.node.push(this.socket.clone().into());
        let Ok(stream) = UnixStream::connect(&this.socket) else {
            return Ok(this);
        };
        this.replaces = this.is_named;
        if let Some(name) = namespace(flags, node) {
            let namespace = File::open(&name)
                .map_err(|error| End::failed(format!("{}: {error}", name.display())))?;
            this.in_namespace(namespace.into());
        }
        match this.forwarders.take_over(&stream) {
            Ok(dev) => {
                eprintln!("{dev} is taken over from another process");
                this.are_taken = true;
            }
            // It has none, or it has just ended.
            Err(HandoverError::Stream { .. }) => {}
            // The node was started anew somewhere else: it gets a device of its own there.
            Err(error @ HandoverError::Namespace { .. }) => {
                eprintln!("not taken over: {}", error_chain(&error));
            }
            Err(error) => return Err(End::failed(error_chain(&error))),
        }
        Ok(this)
    }

    /// From now on they are made in a namespace.
    pub(crate) fn in_namespace(&mut self, namespace: OwnedFd) {
        let sockets = Arc::new(InNamespace::fd(namespace));
        self.forwarders = Forwarders::new(Options::default(), sockets);
    }

    /// Whether packets pass through this process.
    pub(crate) fn are_needed(&self) -> bool {
        !self.forwarders.running().is_empty()
    }

    /// Listens for a process that is to take over, once there is something, or if it was asked for.
    pub(crate) fn listen(&mut self) -> io::Result<Option<tokio::net::UnixListener>> {
        if self.listener.is_some() || !(self.is_named || self.are_needed()) {
            return Ok(None);
        }
        if let Some(folder) = self.socket.parent() {
            fs::create_dir_all(folder)?;
        }
        // Whoever listened there has ended, or has just handed over.
        match fs::remove_file(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&self.socket)?;
        fs::set_permissions(&self.socket, Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let ours = tokio::net::UnixListener::from_std(listener.try_clone()?)?;
        self.listener = Some(listener);
        Ok(Some(ours))
    }

    /// Hands over to the process at the other end.
    pub(crate) fn hand_over(&self, stream: &UnixStream) -> Result<(), HandoverError> {
        hand_over(&self.forwarders, stream)
    }

    /// Starts a process that carries the packets until the next program takes them over.
    pub(crate) fn leave_to_keeper(&mut self) -> Result<(), Error> {
        let (ours, its) = UnixStream::pair()?;
        let listener = self
            .listener
            .take()
            .ok_or("nobody could take the packets over later: there is no socket")?;
        listener.set_nonblocking(false)?;
        Command::new(std::env::current_exe()?)
            .arg("--hold")
            .args(&self.node)
            .stdin(Stdio::from(OwnedFd::from(its)))
            .stdout(Stdio::from(OwnedFd::from(listener)))
            .stderr(Stdio::null())
            // What interrupts us is not for it.
            .process_group(0)
            .spawn()?;
        self.hand_over(&ours)?;
        Ok(())
    }

    /// Nobody listens any more, unless a keeper does.
    pub(crate) fn leave(&mut self) {
        if !self.are_needed() {
            self.forget();
        }
    }

    /// Nothing is kept.
    pub(crate) fn forget(&mut self) {
        if self.listener.take().is_some() {
            fs::remove_file(&self.socket).ok();
        }
    }
}

/// Where a node's packet path is handed over.
fn socket(flags: &Common, node: &NodeId) -> PathBuf {
    if let Some(path) = &flags.handover {
        return path.clone();
    }
    let lab = flags.lab.iter().map(|lab| format!("{lab}-"));
    let name: String = lab.chain([node.to_string()]).collect();
    PathBuf::from(format!("/run/flannel/{}.sock", name.replace('/', "_")))
}

/// The name of a lab's namespace.
fn namespace(flags: &Common, node: &NodeId) -> Option<PathBuf> {
    let lab = flags.lab.as_ref()?;
    Some(Path::new(NAMED).join(format!("{lab}-{node}")))
}

fn hand_over(forwarders: &Forwarders, stream: &UnixStream) -> Result<(), HandoverError> {
    for running in forwarders.running() {
        forwarders.hand_over(running.tunnel.dev, stream)?;
    }
    Ok(())
}

/// Carries the packets of a program that has ended until another takes them over: what `--hold`
/// does. Standard input is the stream on which they come, standard output the socket on which they
/// are asked for.
pub(crate) fn keep(flags: &Common, node: &NodeId) -> Result<(), End> {
    let failed = |error: io::Error| End::failed(error);
    let from = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
    let listener = io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
    let listener = UnixListener::from(listener);
    let namespace = namespace(flags, node);
    let sockets = match &namespace {
        Some(name) => InNamespace::fd(File::open(name).map_err(failed)?.into()),
        None => InNamespace::current(),
    };
    let forwarders = Forwarders::new(Options::default(), Arc::new(sockets));
    let taken = forwarders.take_over(&from);
    taken.map_err(|error| End::failed(error_chain(&error)))?;
    drop(from);
    let (send, asked) = channel();
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            if send.send(stream).is_err() {
                return;
            }
        }
    });
    let path = socket(flags, node);
    let ours = file_id(&path);
    while namespace.as_ref().is_none_or(|name| name.exists())
        && !forwarders.running().is_empty()
        && file_id(&path) == ours
    {
        match asked.recv_timeout(LOOK) {
            // Else it was not taken, and another will ask.
            Ok(stream) if hand_over(&forwarders, &stream).is_ok() => return Ok(()),
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(End::failed("the socket cannot be listened on"));
            }
        }
    }
    // Where another process listens now, nobody could ask this one any more.
    if file_id(&path) == ours {
        fs::remove_file(path).ok();
    }
    Ok(())
}

/// By what a file is told from another one of its name.
fn file_id(path: &Path) -> Option<(u64, u64)> {
    let file = fs::symlink_metadata(path).ok()?;
    Some((file.dev(), file.ino()))
}
