//! Settings under `/proc/sys/net`, which shows the namespace of the thread that looks.

use std::fs;
use std::io;
use std::path::PathBuf;

use flannel_core::kernel::{Error, Result};
use flannel_core::{Family, IfName, Sysctl};

/// The longest value that is written, in bytes; the kernel's own are far shorter.
const MAX_VALUE: usize = 1024;

/// The file of a setting.
///
/// # Errors
/// [`Error::Rejected`] if the name is none of a file: the device's name is checked by its type.
pub(crate) fn path(dev: IfName, family: Family, name: &str) -> Result<PathBuf> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
        return Err(Error::Rejected {
            message: format!(
                "{:?} is not the name of a setting: lower-case letters, digits and _, at most 64",
                name.chars().take(64).collect::<String>()
            ),
        });
    }
    let tree = match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    Ok(PathBuf::from(format!(
        "/proc/sys/net/{tree}/conf/{dev}/{name}"
    )))
}

/// What a setting is; `None`: there is no such setting.
pub(crate) fn read(dev: IfName, family: Family, name: &str) -> Result<Option<Sysctl>> {
    let text = match fs::read_to_string(path(dev, family, name)?) {
        Ok(text) => text,
        // EIO and EINVAL come from files that can only be written.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(meaning(&error, dev, name)),
    };
    Ok(Some(Sysctl {
        dev,
        family,
        name: name.to_owned(),
        value: text.trim().to_owned(),
    }))
}

/// Writes a setting and reads it back.
pub(crate) fn write(sysctl: &Sysctl) -> Result<()> {
    let path = path(sysctl.dev, sysctl.family, &sysctl.name)?;
    let value = sysctl.value.trim();
    if value.is_empty() || value.len() > MAX_VALUE || value.contains(['\n', '\0']) {
        return Err(Error::Rejected {
            message: format!(
                "the value of {} must be one line of 1 to {MAX_VALUE} bytes",
                sysctl.name
            ),
        });
    }
    // Not `fs::write`, which would create a file where /proc is not what it should be.
    fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
        .map_err(|error| meaning(&error, sysctl.dev, &sysctl.name))?;
    match read(sysctl.dev, sysctl.family, &sysctl.name)? {
        Some(found) if found.value == value => Ok(()),
        Some(found) => Err(Error::Rejected {
            message: format!(
                "the kernel made {:?} of {value:?} in {}",
                found.value, sysctl.name
            ),
        }),
        None => Err(no_setting(&sysctl.name)),
    }
}

fn no_setting(name: &str) -> Error {
    Error::Unsupported {
        what: format!("the setting {name}"),
    }
}

fn meaning(error: &io::Error, dev: IfName, name: &str) -> Error {
    let message = format!("setting {name} of {dev}: {error}");
    match error.kind() {
        io::ErrorKind::NotFound => no_setting(name),
        io::ErrorKind::ReadOnlyFilesystem => Error::NotPermitted {
            message: format!("{message}; mount /proc/sys writable in this container"),
        },
        io::ErrorKind::PermissionDenied => Error::NotPermitted {
            message: format!(
                "{message}; CAP_NET_ADMIN in the network namespace is needed, or root where it is of \
                 the first one"
            ),
        },
        _ => Error::Rejected { message },
    }
}

/// Reads a file of the namespace that holds a number; `None`: it cannot be read.
pub(crate) fn number(path: &str) -> Option<i64> {
    let text = fs::read_to_string(path).ok()?;
    text.trim().parse().ok()
}

/// Whether the settings of the namespace may be written. Nothing is written.
pub(crate) fn writable() -> bool {
    fs::OpenOptions::new()
        .write(true)
        .open("/proc/sys/net/ipv4/conf/all/forwarding")
        .is_ok()
}
