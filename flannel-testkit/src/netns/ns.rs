//! [`Ns`]: one network namespace, and how code runs in it.

use std::fmt;
use std::fs::{self, File};
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use super::lab::NAMED;
use super::{Error, Result};

/// A network namespace, held open. Clones are the same namespace.
///
/// It lives as long as a clone, a socket or a process in it does, or its name if it has one.
#[derive(Clone)]
pub struct Ns {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    fd: OwnedFd,
    path: PathBuf,
}

impl Ns {
    /// A new anonymous namespace with the settings of a lab.
    pub(super) fn anonymous(name: String) -> Result<Self> {
        let system = |source: io::Error| Error::System {
            what: "making a network namespace".to_owned(),
            ns: name.clone(),
            source,
        };
        // A thread of its own, because the caller's must stay where it is. The descriptor keeps
        // the namespace when the thread is gone.
        let file = spawn_and_join(&name, || -> io::Result<File> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net")
        })
        .and_then(|made| made)
        .map_err(system)?;
        let fd = OwnedFd::from(file);
        let path = format!("/proc/{}/fd/{}", process::id(), fd.as_raw_fd()).into();
        let ns = Self {
            inner: Arc::new(Inner { name, fd, path }),
        };
        ns.prepare()?;
        Ok(ns)
    }

    /// The namespace that `ip netns` knows by this name, if there is one.
    ///
    /// # Errors
    /// [`Error::System`] if it cannot be opened.
    pub fn named(name: &str) -> Result<Option<Self>> {
        let path = Path::new(NAMED).join(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(Error::System {
                    what: "opening its file".to_owned(),
                    ns: name.to_owned(),
                    source,
                });
            }
        };
        let (name, fd) = (name.to_owned(), OwnedFd::from(file));
        Ok(Some(Self {
            inner: Arc::new(Inner { name, fd, path }),
        }))
    }

    /// The same namespace, known by a path that outlives the process.
    pub(super) fn at_path(self, path: PathBuf) -> Result<Self> {
        let fd = self.inner.fd.try_clone().map_err(|source| Error::System {
            what: "duplicating the descriptor".to_owned(),
            ns: self.inner.name.clone(),
            source,
        })?;
        let name = self.inner.name.clone();
        Ok(Self {
            inner: Arc::new(Inner { name, fd, path }),
        })
    }

    /// Settings that make a fresh namespace the same on every host.
    fn prepare(&self) -> Result<()> {
        for tree in ["all", "default"] {
            // A new namespace copies the IPv4 settings of the host's, where distributions switch
            // the reverse path filter on; it would drop packets of asymmetric paths.
            self.set_sysctl(&format!("ipv4/conf/{tree}/rp_filter"), "0")?;
        }
        if Path::new("/proc/sys/net/ipv6").exists() {
            // Link-local addresses are usable at once, and nothing but the lab configures devices.
            self.set_sysctl("ipv6/conf/default/accept_dad", "0")?;
            self.set_sysctl("ipv6/conf/default/dad_transmits", "0")?;
            self.set_sysctl("ipv6/conf/default/accept_ra", "0")?;
        }
        self.set_up("lo")
    }

    /// Its whole name: the lab's prefix, a dash, the name given.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The namespace as a descriptor, for `setns` and for kernels that take one.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }

    /// The namespace as a file: `/run/netns/NAME` if it is named, else one that is valid as long
    /// as this process holds the namespace (other processes of the same user can open it too).
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Runs a closure on a new thread inside the namespace and returns its value.
    ///
    /// Sockets opened, threads started and processes spawned there belong to the namespace for
    /// good; a socket may be used on any thread afterwards. `/proc/sys/net` is the namespace's.
    ///
    /// # Errors
    /// If no thread can be started or it may not enter the namespace.
    ///
    /// # Panics
    /// If the closure does.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        spawn_and_join(self.name(), || -> io::Result<T> {
            setns(self.fd(), CloneFlags::CLONE_NEWNET)?;
            Ok(f())
        })
        .and_then(|ran| ran)
        .map_err(|source| Error::System {
            what: "entering the namespace".to_owned(),
            ns: self.name().to_owned(),
            source,
        })
    }

    /// Runs a future to its end on a new current-thread runtime inside the namespace. The closure
    /// that makes the future runs there too, so the future need not be `Send`.
    ///
    /// # Errors
    /// As [`run`](Self::run), and if the runtime cannot be built.
    ///
    /// # Panics
    /// If the closure or the future does.
    pub fn block_on<F: Future>(&self, make: impl FnOnce() -> F + Send) -> Result<F::Output>
    where
        F::Output: Send,
    {
        self.run(|| -> io::Result<F::Output> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            Ok(runtime.block_on(async { make().await }))
        })?
        .map_err(|source| Error::System {
            what: "building a runtime".to_owned(),
            ns: self.name().to_owned(),
            source,
        })
    }

    /// Reads a setting, such as `ipv4/ip_forward`, without white space at the ends.
    ///
    /// # Errors
    /// [`Error::System`] if there is no such setting.
    pub fn sysctl(&self, name: &str) -> Result<String> {
        let path = Path::new("/proc/sys/net").join(name);
        let text = self.run(|| fs::read_to_string(path))?;
        text.map(|text| text.trim().to_owned())
            .map_err(|source| Error::System {
                what: format!("reading net/{name}"),
                ns: self.name().to_owned(),
                source,
            })
    }

    /// Writes a setting, such as `ipv4/ip_forward`.
    ///
    /// # Errors
    /// [`Error::System`] if there is no such setting or the kernel refuses the value.
    pub fn set_sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys/net").join(name);
        self.run(|| fs::write(path, value))?
            .map_err(|source| Error::System {
                what: format!("setting net/{name} to {value}"),
                ns: self.name().to_owned(),
                source,
            })
    }

    /// Lets the namespace route packets between its devices, in both families.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn set_forwarding(&self, on: bool) -> Result<()> {
        let value = if on { "1" } else { "0" };
        self.set_sysctl("ipv4/ip_forward", value)?;
        if Path::new("/proc/sys/net/ipv6").exists() {
            self.set_sysctl("ipv6/conf/all/forwarding", value)?;
        }
        Ok(())
    }
}

/// Runs a closure on a named thread of its own and passes on its panic.
fn spawn_and_join<T: Send>(name: &str, f: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn_scoped(scope, f)?;
        match thread.join() {
            Ok(value) => Ok(value),
            Err(panic) => resume_unwind(panic),
        }
    })
}

impl fmt::Debug for Ns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Ns").field(&self.name()).finish()
    }
}
