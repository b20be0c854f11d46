//! [`NamespaceId`]: by what two network namespaces are told apart.
#![forbid(unsafe_code)]

use std::fs::Metadata;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;

use crate::sys;

/// A network namespace, as long as it is there: the file that stands for it (namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamespaceId {
    device: u64,
    inode: u64,
}

impl NamespaceId {
    /// The namespace of an open descriptor of it, or of a file such as `/proc/self/ns/net`.
    pub fn of(file: &Metadata) -> Self {
        Self {
            device: file.dev(),
            inode: file.ino(),
        }
    }

    /// Tells if a queue's device is in this namespace.
    ///
    /// # Errors
    /// `PermissionDenied` to whom may not change the namespace of the device; another error before
    /// Linux 5.2.
    pub(crate) fn holds_device_of(self, queue: BorrowedFd<'_>) -> io::Result<bool> {
        Ok(sys::namespace_of(queue)? == self)
    }
}
