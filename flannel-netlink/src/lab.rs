//! Devices between namespaces: what a test lab or a CNI plugin needs beside an overlay.

use std::os::fd::{AsRawFd, BorrowedFd};

use flannel_core::IfName;
use flannel_core::kernel::{Error, Result};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth};

use crate::error::{Failure, no_device};
use crate::link::{self, RTM_NEWLINK, RTM_SETLINK};
use crate::worker::Worker;
use crate::{CREATE, EXCL, NetlinkKernel};

fn index(worker: &mut Worker, dev: IfName) -> Result<u32> {
    link::get(&mut worker.route, dev)
        .map_err(|failure| failure.meaning(Some(dev), || format!("link {dev}")))?
        .map(|device| device.index)
        .ok_or_else(|| no_device(dev))
}

fn duplicate(namespace: BorrowedFd<'_>) -> Result<std::os::fd::OwnedFd> {
    namespace
        .try_clone_to_owned()
        .map_err(|error| Error::Connection {
            reason: "the file of the network namespace".to_owned(),
            source: Some(Box::new(error)),
        })
}

impl NetlinkKernel {
    /// Makes a pair of virtual Ethernet devices, both down. The other end is made in the network
    /// namespace of `peer_ns`, or in this one.
    ///
    /// # Errors
    /// [`Error::Exists`] if one of the names is taken; [`Error::NotPermitted`]; [`Error::Rejected`]
    /// if the MTU is not between 68 and 65535.
    ///
    /// # Cancel safety
    /// The pair may have been made.
    pub async fn create_veth(
        &self,
        name: IfName,
        mtu: u32,
        peer_name: IfName,
        peer_ns: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let peer_ns = peer_ns.map(duplicate).transpose()?;
        self.worker
            .call(move |worker, _| {
                let mut peer = LinkUnspec::new_with_name(peer_name.as_str())
                    .mtu(mtu)
                    .build();
                if let Some(namespace) = &peer_ns {
                    peer.attributes
                        .push(LinkAttribute::NetNsFd(namespace.as_raw_fd()));
                }
                let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
                    .name(name.to_string())
                    .mtu(mtu)
                    .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
                    .build();
                worker
                    .route
                    .request(RTM_NEWLINK, CREATE | EXCL, &message)
                    .map_err(|failure| failure.meaning(None, || format!("link {name}")))
            })
            .await?
    }

    /// Puts a device into a bridge, or takes it out of the one it is in.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`] if one of them does not exist; what the kernel says otherwise.
    ///
    /// # Cancel safety
    /// It may have been done.
    pub async fn set_master(&self, dev: IfName, master: Option<IfName>) -> Result<()> {
        self.worker
            .call(move |worker, _| {
                let master = master.map_or(Ok(0), |master| index(worker, master))?;
                let index = index(worker, dev)?;
                let message = LinkUnspec::new_with_index(index).controller(master).build();
                set(worker, dev, message)
            })
            .await?
    }

    /// Moves a device into another network namespace, where it is down and without addresses.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`]; [`Error::Exists`] if the name is taken there; what the kernel says
    /// otherwise.
    ///
    /// # Cancel safety
    /// It may have been done.
    pub async fn move_link(&self, dev: IfName, namespace: BorrowedFd<'_>) -> Result<()> {
        let namespace = duplicate(namespace)?;
        self.worker
            .call(move |worker, _| {
                let index = index(worker, dev)?;
                let message = LinkUnspec::new_with_index(index)
                    .setns_by_fd(namespace.as_raw_fd())
                    .build();
                set(worker, dev, message)
            })
            .await?
    }
}

fn set(
    worker: &mut Worker,
    dev: IfName,
    message: netlink_packet_route::link::LinkMessage,
) -> Result<()> {
    worker
        .route
        .request(RTM_SETLINK, 0, &message)
        .map_err(|failure: Failure| failure.meaning(Some(dev), || format!("link {dev}")))
}
