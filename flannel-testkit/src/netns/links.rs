//! Devices, addresses and routes of a namespace, made through the kernel crate.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;

use flannel_core::kernel::{self, Kernel};
use flannel_core::{
    Address, IfName, Link, LinkKind, MAIN_TABLE, Object, Observed, Op, Route, RouteProtocol,
    RouteTarget, Scope, Subnet, Vxlan,
};
use flannel_netlink::NetlinkKernel;

use super::{Error, Lab, Ns, Result};

/// A device name out of a text.
pub(super) fn name(text: &str) -> Result<IfName> {
    IfName::new(text).map_err(|error| Error::Device {
        reason: error.to_string(),
    })
}

impl Ns {
    /// Reads what the namespace has.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn observe(&self, scope: &Scope) -> Result<Observed> {
        self.with_kernel("reading the network configuration", async |kernel| {
            kernel.observe(scope).await
        })
    }

    /// Carries out changes in their order, all of them, also if one fails.
    ///
    /// # Errors
    /// [`Error::Kernel`] names the first change that failed.
    pub fn apply(&self, ops: &[Op]) -> Result<()> {
        let results = self.with_kernel("changing the network configuration", async |kernel| {
            Ok(kernel.apply(ops).await)
        })?;
        for (op, result) in ops.iter().zip(results) {
            result.map_err(|source| Error::Kernel {
                what: format!("{} {}", op.verb(), op.object()),
                ns: self.name().to_owned(),
                source,
            })?;
        }
        Ok(())
    }

    /// Makes a bridge that is up.
    ///
    /// # Errors
    /// [`Error::Kernel`], such as for a name that is taken.
    pub fn add_bridge(&self, dev: &str, mtu: u32) -> Result<()> {
        let link = Link {
            name: name(dev)?,
            kind: LinkKind::Bridge,
            mtu: Some(mtu),
            mac: None,
            up: true,
            alias: None,
        };
        self.apply(&[Op::Create(Object::Link(link))])
    }

    /// Makes a pair of devices, one here and one in another (or the same) namespace, both down.
    ///
    /// # Errors
    /// [`Error::Kernel`], such as for a name that is taken.
    pub fn add_veth(&self, dev: &str, peer: &Self, peer_dev: &str, mtu: u32) -> Result<()> {
        let (here, there) = (name(dev)?, name(peer_dev)?);
        let what = format!("making the devices {dev} and {peer_dev}");
        self.with_kernel(&what, async |kernel| {
            kernel.create_veth(here, mtu, there, Some(peer.fd())).await
        })
    }

    /// Removes a device, and with it the other end of a pair.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`], [`Error::Kernel`].
    pub fn remove_link(&self, dev: &str) -> Result<()> {
        let link = self.link(dev)?;
        self.apply(&[Op::Delete(Object::Link(link))])
    }

    /// Puts a device into a bridge, or takes it out of the one it is in.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn set_master(&self, dev: &str, bridge: Option<&str>) -> Result<()> {
        let (link, master) = (name(dev)?, bridge.map(name).transpose()?);
        let what = format!("putting {dev} into {}", bridge.unwrap_or("no bridge"));
        self.with_kernel(&what, async |kernel| kernel.set_master(link, master).await)
    }

    /// Sets a device up.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`], [`Error::Kernel`].
    pub fn set_up(&self, dev: &str) -> Result<()> {
        self.change_link(dev, |link| link.up = true)
    }

    /// Sets a device down; its routes go.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`], [`Error::Kernel`].
    pub fn set_down(&self, dev: &str) -> Result<()> {
        self.change_link(dev, |link| link.up = false)
    }

    /// Sets the MTU of a device, in bytes.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`], [`Error::Kernel`].
    pub fn set_mtu(&self, dev: &str, mtu: u32) -> Result<()> {
        self.change_link(dev, |link| link.mtu = Some(mtu))
    }

    /// Gives a device an alias, a text for people and programs.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`], [`Error::Kernel`].
    pub fn set_alias(&self, dev: &str, alias: &str) -> Result<()> {
        self.change_link(dev, |link| link.alias = Some(alias.to_owned()))
    }

    /// Gives a device an address, which is usable at once (no duplicate detection).
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn add_address(&self, dev: &str, ip: IpAddr, prefix_len: u8) -> Result<()> {
        self.apply(&[Op::Create(address(dev, ip, prefix_len)?)])
    }

    /// Takes an address from a device.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn remove_address(&self, dev: &str, ip: IpAddr, prefix_len: u8) -> Result<()> {
        self.apply(&[Op::Delete(address(dev, ip, prefix_len)?)])
    }

    /// Adds a route, as `ip route add` does.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn add_route(&self, dst: Subnet, gateway: IpAddr, dev: &str) -> Result<()> {
        self.apply(&[Op::Create(route(dst, gateway, dev)?)])
    }

    /// Removes a route that [`add_route`](Self::add_route) made.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub fn remove_route(&self, dst: Subnet, gateway: IpAddr, dev: &str) -> Result<()> {
        self.apply(&[Op::Delete(route(dst, gateway, dev)?)])
    }

    fn link(&self, dev: &str) -> Result<Link> {
        let dev = name(dev)?;
        let observed = self.observe(&Scope::default())?;
        let found = observed
            .objects
            .into_values()
            .find_map(|object| match object {
                Object::Link(link) if link.name == dev => Some(link),
                _ => None,
            });
        found.ok_or_else(|| Error::NoSuchDevice {
            dev,
            ns: self.name().to_owned(),
        })
    }

    fn change_link(&self, dev: &str, change: impl FnOnce(&mut Link)) -> Result<()> {
        let mut link = self.link(dev)?;
        change(&mut link);
        self.apply(&[Op::Change(Object::Link(link))])
    }

    /// Does something with a kernel in the namespace, which is let go of at the end: whoever holds
    /// one holds the namespace.
    fn with_kernel<T: Send>(
        &self,
        what: &str,
        f: impl AsyncFnOnce(&NetlinkKernel) -> kernel::Result<T> + Send,
    ) -> Result<T> {
        self.block_on(|| async {
            let kernel = NetlinkKernel::new()?;
            f(&kernel).await
        })?
        .map_err(|source| Error::Kernel {
            what: what.to_owned(),
            ns: self.name().to_owned(),
            source,
        })
    }
}

fn address(dev: &str, ip: IpAddr, prefix_len: u8) -> Result<Object> {
    Ok(Object::Address(Address {
        dev: name(dev)?,
        ip,
        prefix_len,
    }))
}

fn route(dst: Subnet, gateway: IpAddr, dev: &str) -> Result<Object> {
    Ok(Object::Route(Route {
        table: MAIN_TABLE,
        dst,
        metric: Route::default_metric(dst.family()),
        target: RouteTarget::Gateway {
            gateway,
            dev: name(dev)?,
            onlink: false,
        },
        protocol: RouteProtocol::BOOT,
        source: None,
    }))
}

/// A kind of device that a kernel may have been built without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// Bridges.
    Bridge,
    /// Pairs of virtual Ethernet devices.
    Veth,
    /// VXLAN devices.
    Vxlan,
    /// TUN devices: `/dev/net/tun` is there.
    Tun,
}

/// The kinds of device that this kernel has, found out by making one of each in a namespace that
/// is thrown away. A test of a kind that is missing is to be [skipped](crate::skip).
///
/// # Errors
/// As [`Lab::new`], and if making a device fails for another reason than its kind.
pub fn kinds() -> Result<BTreeSet<Kind>> {
    let lab = Lab::new("kinds")?;
    let ns = lab.namespace("probe")?;
    let vxlan = Link {
        name: name("vxlan")?,
        kind: LinkKind::Vxlan(Vxlan {
            vni: 1,
            port: 8472,
            underlay: None,
            local: None,
            learning: false,
            gbp: false,
        }),
        mtu: None,
        mac: None,
        up: false,
        alias: None,
    };
    let mut kinds = BTreeSet::new();
    for (kind, made) in [
        (Kind::Bridge, ns.add_bridge("bridge", 1500)),
        (Kind::Veth, ns.add_veth("veth-a", &ns, "veth-b", 1500)),
        (Kind::Vxlan, ns.apply(&[Op::Create(Object::Link(vxlan))])),
    ] {
        match made {
            Ok(()) => {
                kinds.insert(kind);
            }
            Err(Error::Kernel {
                source: kernel::Error::Unsupported { .. },
                ..
            }) => {}
            Err(error) => return Err(error),
        }
    }
    if Path::new("/dev/net/tun").exists() {
        kinds.insert(Kind::Tun);
    }
    Ok(kinds)
}
