//! A process that carries the packets of a program that has ended until another takes them over,
//! and does nothing else: what `--hold` does.

use std::env;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use flannel::udp::Options;
use flannel::{Forwarders, InNamespace, NodeId, PacketPath, error_chain};

use super::path::{NAMED, hand_over, lab_namespace, socket};
use super::socket::{file_id, inherit, namespace_id};
use super::{Common, End};

/// The interval between two looks if the namespace of its device is still wanted: a lab that is
/// removed may be made anew at once.
const LOOK: Duration = Duration::from_millis(100);

/// Carries the packets until they are taken over, its time is up, or the namespace has lost its
/// name. Standard input is the stream on which they come, standard output the socket on which they
/// are asked for.
pub(crate) fn keep(flags: &Common, node: &NodeId) -> Result<(), End> {
    let failed = |error: io::Error| End::failed(error);
    // It was started by its descriptor, which is no name to find it by.
    if let Some(name) = env::args_os().next()
        && let Some(name) = Path::new(&name).file_name()
    {
        fs::write("/proc/self/comm", name.as_encoded_bytes()).ok();
    }
    let from = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?);
    let listener = io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
    let listener = inherit(listener).map_err(failed)?;
    let lab = lab_namespace(flags, node);
    let sockets = match &lab {
        Some(name) => InNamespace::fd(File::open(name).map_err(failed)?.into()),
        None => InNamespace::current(),
    };
    let namespace = Namespace::find(lab);
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
    let over = Instant::now() + flags.hold_for();
    while Instant::now() < over
        && namespace.is_wanted()
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

/// The namespace that packets are carried in, by the name that `ip netns` knows it by. One without
/// a name is wanted as long as it is there.
struct Namespace {
    name: Option<PathBuf>,
    id: Option<(u64, u64)>,
}

impl Namespace {
    /// That of the lab, or else our own.
    fn find(lab: Option<PathBuf>) -> Self {
        let own = Path::new("/proc/self/ns/net");
        let id = namespace_id(lab.as_deref().unwrap_or(own));
        let name = lab.or_else(|| {
            let names = fs::read_dir(NAMED).ok()?.flatten();
            let mut names = names.map(|entry| entry.path());
            names.find(|name| namespace_id(name) == id)
        });
        Self { name, id }
    }

    /// Tells if it still has its name: another one of that name is another one.
    fn is_wanted(&self) -> bool {
        let name = self.name.as_ref();
        name.is_none_or(|name| namespace_id(name) == self.id)
    }
}
