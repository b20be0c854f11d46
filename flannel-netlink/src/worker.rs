//! The thread that talks to the kernel.
//!
//! Which namespace a socket is opened in, and which one `/proc/sys/net` shows, is a property of
//! the thread. So there is one thread per kernel, which enters the namespace once and never
//! leaves it, and everything is done there. It ends when the kernel is dropped.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use flannel_core::kernel::{Error, Result};
use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE};
use nix::sched::{CloneFlags, setns};
use tokio::sync::oneshot;

use crate::NetlinkOptions;
use crate::connection::{Connection, Settings};
use crate::offload::Ethtool;

/// What the thread owns.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) route: Connection,
    pub(crate) ethtool: Ethtool,
    pub(crate) filter: Connection,
    pub(crate) options: NetlinkOptions,
}

type Job = Box<dyn FnOnce(&mut Worker) + Send>;

/// The other end of the thread.
#[derive(Debug)]
pub(crate) struct Handle {
    /// Not bounded by itself, but by the callers: each waits for the answer to what it sent.
    jobs: mpsc::Sender<Job>,
    progress: Arc<AtomicU64>,
    deadline: Duration,
}

/// The namespace to work in.
#[derive(Debug)]
pub(crate) enum Namespace {
    /// That of the calling thread.
    Current,
    /// That of a file such as `/run/netns/blue`.
    File(OwnedFd),
}

fn broken(what: &str, source: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Connection {
        reason: what.to_owned(),
        source: Some(Box::new(source)),
    }
}

fn ended() -> Error {
    Error::Connection {
        reason: "the thread that talks to the kernel has ended".to_owned(),
        source: None,
    }
}

impl Namespace {
    pub(crate) fn open(path: &std::path::Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::NotFound {
                message: format!("the network namespace {}", path.display()),
            },
            _ => broken(&format!("opening {}", path.display()), error),
        })?;
        Ok(Self::File(file.into()))
    }

    fn enter(self) -> Result<()> {
        let Self::File(file) = self else {
            return Ok(());
        };
        setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| match errno {
            nix::errno::Errno::EPERM => Error::NotPermitted {
                message: "entering the network namespace; that needs CAP_SYS_ADMIN".to_owned(),
            },
            errno => broken("entering the network namespace", errno),
        })
    }
}

/// Starts the thread. It is in the namespace and has its socket when this returns.
pub(crate) fn start(namespace: Namespace, options: NetlinkOptions) -> Result<Handle> {
    let progress = Arc::new(AtomicU64::new(0));
    #[allow(
        clippy::disallowed_methods,
        reason = "bounded by the callers, who each wait for theirs"
    )]
    let (jobs, inbox) = mpsc::channel::<Job>();
    let (ready, started) = mpsc::sync_channel(1);
    let settings = Settings {
        deadline: options.deadline,
        receive_buffer: options.receive_buffer,
        progress: Arc::clone(&progress),
    };
    let deadline = options.deadline;
    std::thread::Builder::new()
        .name("netlink".to_owned())
        .spawn(move || {
            let mut worker = Worker {
                route: Connection::new(NETLINK_ROUTE, settings.clone()),
                ethtool: Ethtool::new(Connection::new(NETLINK_GENERIC, settings.clone())),
                filter: Connection::new(NETLINK_NETFILTER, settings),
                options,
            };
            let result = namespace.enter().and_then(|()| {
                worker
                    .route
                    .check()
                    .map_err(|failure| failure.meaning(None, || "connecting".to_owned()))
            });
            let failed = result.is_err();
            if ready.send(result).is_err() || failed {
                return;
            }
            for job in inbox {
                job(&mut worker);
            }
        })
        .map_err(|error| broken("starting a thread", error))?;
    started.recv().map_err(|_| ended())??;
    Ok(Handle {
        jobs,
        progress,
        deadline,
    })
}

impl Handle {
    /// Starts another thread in the same namespace.
    pub(crate) fn start_another(&self) -> Result<Self> {
        let (reply, answer) = mpsc::sync_channel(1);
        // A thread starts in the namespace of the one that makes it.
        self.send(move |worker| {
            let options = worker.options.clone();
            drop(reply.send(start(Namespace::Current, options)));
        })?;
        answer.recv().map_err(|_| ended())?
    }

    /// Hands the thread something to do, without waiting for it.
    pub(crate) fn send(&self, job: impl FnOnce(&mut Worker) + Send + 'static) -> Result<()> {
        self.jobs.send(Box::new(job)).map_err(|_| ended())
    }

    /// Has the thread do something and waits for the answer. The second argument of the job tells
    /// whether somebody still waits.
    ///
    /// The deadline of each request is kept by the thread. But the kernel may hold the thread
    /// itself, where nothing can interrupt it (it waits for the lock of all network configuration
    /// while it takes a request): when no datagram has moved for longer than the deadline, the
    /// caller is let go and the thread goes on by itself.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Worker, &dyn Fn() -> bool) -> T + Send + 'static,
    ) -> Result<T> {
        let (reply, mut answer) = oneshot::channel();
        self.send(move |worker| {
            if !reply.is_closed() {
                let result = job(worker, &|| reply.is_closed());
                // Nobody waits any more: what was done is seen when the state is read again.
                drop(reply.send(result));
            }
        })?;
        let patience = self.deadline.saturating_add(self.deadline / 4);
        let mut seen = self.progress.load(Ordering::Relaxed);
        loop {
            match tokio::time::timeout(patience, &mut answer).await {
                Ok(result) => return result.map_err(|_| ended()),
                Err(_) => {
                    let now = self.progress.load(Ordering::Relaxed);
                    if now == seen {
                        return Err(Error::TimedOut);
                    }
                    seen = now;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread that the kernel holds lets its caller go, and is of use again afterwards.
    #[test]
    fn a_caller_is_let_go_when_nothing_moves() {
        let options = NetlinkOptions::new().deadline(Duration::from_millis(20));
        let handle = start(Namespace::Current, options).expect("a thread");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        let (release, held) = mpsc::sync_channel::<()>(1);
        runtime.block_on(async {
            let stuck = handle.call(move |_, _| held.recv().is_ok()).await;
            assert!(matches!(stuck, Err(Error::TimedOut)), "{stuck:?}");
            release.send(()).expect("the thread waits");
            assert_eq!(handle.call(|_, _| 7).await.expect("an answer"), 7);
        });
    }

    /// Work that goes on is waited for, however long it takes.
    #[test]
    fn a_caller_waits_while_work_goes_on() {
        let options = NetlinkOptions::new().deadline(Duration::from_millis(40));
        let handle = start(Namespace::Current, options).expect("a thread");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        let progress = Arc::clone(&handle.progress);
        let busy = handle.call(move |_, _| {
            for _ in 0..40 {
                std::thread::sleep(Duration::from_millis(5));
                progress.fetch_add(1, Ordering::Relaxed);
            }
        });
        runtime.block_on(busy).expect("an answer");
    }
}
