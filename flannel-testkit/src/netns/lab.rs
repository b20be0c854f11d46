//! [`Lab`]: the owner of namespaces.

use std::fs::{self, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{Error, Ns, Result};
use crate::skipping::require;

/// Where `ip netns` looks for namespaces.
pub(super) const NAMED: &str = "/run/netns";

/// Makes namespaces and takes them away again.
///
/// Dropping it, or [`cleanup`](Self::cleanup), removes the names and lets go of the namespaces;
/// each is gone once the last clone of its [`Ns`] and the last socket in it are. Share a lab by
/// `Arc` with whatever handles Ctrl-C: no handler is installed here.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    named: bool,
    namespaces: Mutex<Vec<Ns>>,
}

impl Lab {
    /// A lab of anonymous namespaces, of which nothing remains however the process ends. The
    /// prefix is for messages and thread names.
    ///
    /// # Errors
    /// [`Error::NotPermitted`] names the capabilities that are missing; [`Error::Name`].
    pub fn new(prefix: &str) -> Result<Self> {
        Self::build(prefix, false)
    }

    /// A lab of namespaces named `PREFIX-NAME`, which `ip netns exec` finds. A process that is
    /// killed outright leaves them behind.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn named(prefix: &str) -> Result<Self> {
        Self::build(prefix, true)
    }

    /// A lab of anonymous namespaces for a test, or `None` after noting that the test is skipped
    /// because the process may not make namespaces.
    ///
    /// # Panics
    /// In CI, where a test may not be skipped for that; and if the name cannot be a prefix.
    pub fn for_test(test: &str) -> Option<Self> {
        match Self::new(test) {
            Ok(lab) => Some(lab),
            Err(error @ Error::NotPermitted { .. }) => {
                require(test, Some(&error.to_string()));
                None
            }
            Err(error) => panic!("no lab for {test}: {error}"),
        }
    }

    fn build(prefix: &str, named: bool) -> Result<Self> {
        check_name(prefix)?;
        check_permitted()?;
        Ok(Self {
            prefix: prefix.to_owned(),
            named,
            namespaces: Mutex::default(),
        })
    }

    /// Makes a namespace with nothing but a loopback device, which is up.
    ///
    /// # Errors
    /// [`Error::Name`], [`Error::NameTaken`], or what the system said.
    pub fn namespace(&self, name: &str) -> Result<Ns> {
        check_name(name)?;
        let name = format!("{}-{name}", self.prefix);
        // Held while the namespace is made, so that a clean-up from another thread misses none.
        let mut namespaces = self.lock();
        if namespaces.iter().any(|ns| ns.name() == name) {
            return Err(Error::NameTaken { name });
        }
        let mut ns = Ns::anonymous(name)?;
        if self.named {
            ns = publish(ns)?;
        }
        namespaces.push(ns.clone());
        Ok(ns)
    }

    /// The namespaces made so far, in order.
    pub fn namespaces(&self) -> Vec<Ns> {
        self.lock().clone()
    }

    /// Removes the names and lets go of the namespaces. Doing it twice is harmless.
    pub fn cleanup(&self) {
        let namespaces = std::mem::take(&mut *self.lock());
        if self.named {
            for ns in namespaces.iter().rev() {
                if let Err(error) = unmount_name(ns.path()) {
                    tracing::warn!(ns = ns.name(), %error, "the name of a namespace stays behind");
                }
            }
        }
    }

    /// Ends the lab and leaves its named namespaces behind; returns their names. Anonymous ones
    /// cannot outlive the process.
    pub fn keep(self) -> Vec<String> {
        let namespaces = std::mem::take(&mut *self.lock());
        if self.named {
            namespaces.iter().map(|ns| ns.name().to_owned()).collect()
        } else {
            Vec::new()
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Ns>> {
        // A panic in the middle leaves a list that is complete: a namespace is added whole.
        self.namespaces
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.cleanup();
    }
}

/// Checks that a text can be a file name under `/run/netns` and is easy to type.
pub(super) fn check_name(name: &str) -> Result<()> {
    let good = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    let first = name
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphanumeric());
    if first && name.len() <= 64 && name.bytes().all(good) {
        Ok(())
    } else {
        Err(Error::Name {
            name: name.chars().take(80).collect(),
        })
    }
}

/// Whether the process may make namespaces.
pub(super) fn check_permitted() -> Result<()> {
    let missing = missing_capabilities();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::NotPermitted {
        missing: missing.join(", "),
    })
}

/// The capabilities a lab needs and the process lacks; empty also if that cannot be read.
fn missing_capabilities() -> Vec<&'static str> {
    /// Names and bit numbers of `linux/capability.h`.
    const NEEDED: [(&str, u32); 3] = [
        ("CAP_SYS_ADMIN", 21),
        ("CAP_NET_ADMIN", 12),
        ("CAP_NET_RAW", 13),
    ];
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(u64::MAX);
    NEEDED
        .into_iter()
        .filter(|(_, bit)| effective >> bit & 1 == 0)
        .map(|(name, _)| name)
        .collect()
}

/// The same namespace with a name that `ip netns exec` finds.
pub(super) fn publish(ns: Ns) -> Result<Ns> {
    let path = mount_name(&ns)?;
    ns.at_path(path)
}

/// Binds a namespace to a file of its name, as `ip netns add` does.
fn mount_name(ns: &Ns) -> Result<PathBuf> {
    let system = |what: &str, source: io::Error| Error::System {
        what: what.to_owned(),
        ns: ns.name().to_owned(),
        source,
    };
    prepare_directory().map_err(|source| system("preparing /run/netns", source))?;
    let path = Path::new(NAMED).join(ns.name());
    if let Err(source) = OpenOptions::new().write(true).create_new(true).open(&path) {
        return Err(if source.kind() == io::ErrorKind::AlreadyExists {
            Error::NameTaken {
                name: ns.name().to_owned(),
            }
        } else {
            system("creating its file", source)
        });
    }
    let bound = mount(
        Some(ns.path()),
        &path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    );
    if let Err(errno) = bound {
        let _ = fs::remove_file(&path);
        return Err(system("mounting its file", errno.into()));
    }
    Ok(path)
}

pub(super) fn unmount_name(path: &Path) -> io::Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // Somebody ran `ip netns del` meanwhile, or unmounted the file and left it.
        Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
        Err(errno) => return Err(errno.into()),
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes `/run/netns` a shared mount point, so that the removal of a name reaches the mount
/// namespaces of other processes; else they would keep the network namespace alive.
fn prepare_directory() -> io::Result<()> {
    fs::create_dir_all(NAMED)?;
    let share = || {
        mount(
            None::<&str>,
            NAMED,
            None::<&str>,
            MsFlags::MS_SHARED | MsFlags::MS_REC,
            None::<&str>,
        )
    };
    match share() {
        // Not a mount point yet.
        Err(Errno::EINVAL) => {
            fs::set_permissions(NAMED, Permissions::from_mode(0o755))?;
            mount(
                Some(NAMED),
                NAMED,
                None::<&str>,
                MsFlags::MS_BIND | MsFlags::MS_REC,
                None::<&str>,
            )?;
            Ok(share()?)
        }
        result => Ok(result?),
    }
}
