//! The packet path of a backend that has one in user space: taken over from the program that had it
//! before, handed over to the next, and kept meanwhile by a process that does nothing else.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use flannel::udp::{HandoverError, Options};
use flannel::{Forwarders, InNamespace, NodeId, PacketPath, error_chain};

use super::socket::{check_folder, listen};
use super::tell::say;
use super::{Common, End, Error, holder};

/// Where namespaces have their names.
pub(super) const NAMED: &str = "/run/netns";
/// The number of processes that are talked to in turn: one that is ended may leave its packets to
/// another.
const OTHERS: u32 = 4;

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
    /// This program, whatever its file has become since: what an upgrade has replaced on disk has
    /// no name any more.
    program: File,
    /// What a keeper is told of the node.
    node: Vec<OsString>,
}

impl Paths {
    /// Takes over what another process of this node has; else there is none yet.
    pub(crate) fn find(flags: &Common, node: &NodeId) -> Result<Self, End> {
        let socket = socket(flags, node);
        check_folder(&socket).map_err(|error| match flags.handover {
            Some(_) => End::usage(format!("--handover: {error}")),
            None => End::failed(error),
        })?;
        let program = File::open("/proc/self/exe");
        let program = program.map_err(|error| End::failed(format!("this program: {error}")))?;
        let mut this = Self {
            forwarders: Forwarders::default(),
            are_taken: false,
            replaces: false,
            is_named: flags.handover.is_some(),
            socket,
            listener: None,
            program,
            node: vec!["--node".into(), node.to_string().into()],
        };
        let lab = flags.lab.iter().flat_map(|lab| ["--lab", lab]);
        this.node.extend(lab.map(OsString::from));
        this.node.push("--handover".into());
        this.node.push(this.socket.clone().into());
        this.node.push("--hold-for".into());
        this.node.push(flags.hold_for.to_string().into());
        if let Some(name) = lab_namespace(flags, node) {
            match File::open(&name) {
                Ok(namespace) => this.in_namespace(namespace.into()),
                // The lab is new, and who keeps packets of an earlier one is about to end.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(this),
                Err(error) => return Err(End::failed(format!("{}: {error}", name.display()))),
            }
        }
        for _ in 0..OTHERS {
            let Ok(stream) = UnixStream::connect(&this.socket) else {
                break;
            };
            this.replaces = this.is_named;
            if !this.take_over(&stream) {
                break;
            }
        }
        Ok(this)
    }

    /// Takes over from the process at the other end. That one cannot keep this one from starting:
    /// it is ended if it cannot hand over, and what that costs is said. Answers whether to look for
    /// another one that it has left its packets to.
    fn take_over(&mut self, stream: &UnixStream) -> bool {
        let error = match self.forwarders.take_over(stream) {
            Ok(dev) => {
                eprintln!("{dev} is taken over from another process");
                self.are_taken = true;
                return false;
            }
            Err(error) => error,
        };
        let why = error_chain(&error);
        match error {
            // It has none, or it has just ended.
            HandoverError::Stream { source, .. } if !is_silence(&source) => return false,
            // The node was started anew somewhere else: it gets a device of its own there. Or it is
            // another user's, who has nothing of ours.
            HandoverError::Namespace { .. } | HandoverError::Stranger { .. } => {
                eprintln!("not taken over: {why}");
                return false;
            }
            HandoverError::Version { .. } if Forwarders::dismiss(stream).is_ok() => {
                lost(&format!("{why}: it has ended, as it was asked to"));
                return false;
            }
            _ => {}
        }
        match holder::end(&self.socket) {
            Ok(id) => {
                lost(&format!("{why}: process {id} is ended"));
                true
            }
            Err(error) => {
                eprintln!("not taken over: {why}; and it cannot be ended: {error}");
                false
            }
        }
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
        // Whoever listened there has ended, or has just handed over.
        let listener = listen(&self.socket)?;
        listener.set_nonblocking(true)?;
        let ours = tokio::net::UnixListener::from_std(listener.try_clone()?)?;
        self.listener = Some(listener);
        Ok(Some(ours))
    }

    /// Hands over to the process at the other end.
    pub(crate) fn hand_over(&self, stream: &UnixStream) -> Result<(), HandoverError> {
        hand_over(&self.forwarders, stream)
    }

    /// Starts a process that carries the packets until the next program takes them over. Answers
    /// its id.
    pub(crate) fn leave_to_keeper(&mut self) -> Result<u32, Error> {
        let (ours, its) = UnixStream::pair()?;
        let listener = self
            .listener
            .take()
            .ok_or("nobody could take the packets over later: there is no socket")?;
        listener.set_nonblocking(false)?;
        let name = env::args_os().next().unwrap_or_else(|| "node".into());
        let program = format!("/proc/self/fd/{}", self.program.as_raw_fd());
        let keeper = Command::new(program)
            .arg0(name)
            .arg("--hold")
            .args(&self.node)
            .stdin(Stdio::from(OwnedFd::from(its)))
            .stdout(Stdio::from(OwnedFd::from(listener)))
            .stderr(Stdio::null())
            // What interrupts us is not for it.
            .process_group(0)
            .spawn()?;
        self.hand_over(&ours)?;
        Ok(keeper.id())
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
pub(super) fn socket(flags: &Common, node: &NodeId) -> PathBuf {
    if let Some(path) = &flags.handover {
        return path.clone();
    }
    let lab = flags.lab.iter().map(|lab| format!("{lab}-"));
    let name: String = lab.chain([node.to_string()]).collect();
    PathBuf::from(format!("/run/flannel/{}.sock", name.replace('/', "_")))
}

/// The name of a lab's namespace.
pub(super) fn lab_namespace(flags: &Common, node: &NodeId) -> Option<PathBuf> {
    let lab = flags.lab.as_ref()?;
    Some(Path::new(NAMED).join(format!("{lab}-{node}")))
}

pub(super) fn hand_over(forwarders: &Forwarders, stream: &UnixStream) -> Result<(), HandoverError> {
    for running in forwarders.running() {
        forwarders.hand_over(running.tunnel.dev, stream)?;
    }
    Ok(())
}

/// Says that packets are lost, and why.
fn lost(why: &str) {
    say(&format!("packet-path lost reason={why:?}"));
    eprintln!("packets are lost until this one is ready: {why}");
}

/// Tells if somebody had all the time to say something, and did not.
fn is_silence(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}
