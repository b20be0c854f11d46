//! [`VxlanBackend`]: what this node publishes, and how a network is made of its lease.

use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::backend::{Error, PerFamily, Result, check_lease};
use flannel_core::{
    Backend, BackendType, DualStack, Family, Gateways, Lease, LeaseAttrs, Link, LinkKind, MacAddr,
    Network, NodeContext, Note, Object, ObjectKey, mtu, stable_hash,
};

use crate::config::{VxlanConfig, device_name};
use crate::data::VxlanData;
use crate::network::{Device, VxlanNetwork};

/// Whether the kernel may leave checksums of tunnelled packets to the hardware
/// (`tx-checksum-ip-generic` of the overlay device).
///
/// Some kernels and virtual network cards compute them wrongly for VXLAN, which shows as TCP
/// connections that take a minute to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ChecksumOffload {
    /// Off on Linux before 5.7, where it is known to be wrong; else as the kernel has it.
    #[default]
    Auto,
    /// Always on.
    On,
    /// Always off.
    Off,
}

/// The VXLAN backend: compatible with flannel's on the wire, in the lease and in its devices.
#[derive(Debug, Clone, Default)]
pub struct VxlanBackend {
    checksum_offload: ChecksumOffload,
    without_nexthops: bool,
}

impl VxlanBackend {
    /// The backend with its defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the policy for checksum offload.
    #[must_use]
    pub const fn with_checksum_offload(mut self, policy: ChecksumOffload) -> Self {
        self.checksum_offload = policy;
        self
    }

    /// Whether nexthop objects are used where the kernel has them; default yes. Without them the
    /// time to program peers grows with the square of their number (0.3 s at 5,000, half a minute
    /// at 50,000).
    #[must_use]
    pub const fn with_nexthops(mut self, yes: bool) -> Self {
        self.without_nexthops = !yes;
        self
    }

    /// The devices of each family of the config.
    fn devices(&self, cx: &NodeContext<'_>, config: &VxlanConfig) -> Result<PerFamily<Device>> {
        PerFamily::make(cx.config, |family| {
            let name = device_name(family, config.vni).ok_or_else(|| Error::Other {
                what: format!("VNI {} makes no name of a device", config.vni),
                source: None,
            })?;
            Ok(Device {
                name,
                mac: vtep_mac(cx, config.vni, family),
                local: cx.source(family)?,
                mtu: config.device_mtu(family, cx.external.mtu)?,
            })
        })
    }

    /// What to do about checksum offload, and why.
    fn checksum_policy(&self, cx: &NodeContext<'_>) -> (Option<bool>, Note) {
        let (wanted, reason) = match self.checksum_offload {
            ChecksumOffload::On => (Some(true), "on: set by the host program".to_owned()),
            ChecksumOffload::Off => (Some(false), "off: set by the host program".to_owned()),
            ChecksumOffload::Auto => match release_below(&cx.features.release, (5, 7)) {
                Some(true) => (
                    Some(false),
                    format!(
                        "off: Linux {} may send wrong checksums through VXLAN (fixed in 5.7)",
                        cx.features.release
                    ),
                ),
                Some(false) => (
                    None,
                    format!("as the kernel has it: Linux {}", cx.features.release),
                ),
                None => (
                    None,
                    "as the kernel has it: its release is not known".to_owned(),
                ),
            },
        };
        let (wanted, text) = if wanted.is_some() && !cx.features.offloads {
            (
                None,
                format!("{reason}; but the kernel does not let offloads be set"),
            )
        } else {
            (wanted, reason)
        };
        (
            wanted,
            Note {
                topic: "checksum-offload".to_owned(),
                text,
            },
        )
    }
}

#[async_trait]
impl Backend for VxlanBackend {
    fn backend_type(&self) -> BackendType {
        BackendType::vxlan()
    }

    fn reaches(&self) -> Vec<BackendType> {
        // As with direct routing: it has no end of a tunnel, and needs none where it works at all.
        vec![BackendType::host_gw(), BackendType::udp()]
    }

    fn attrs<'a>(&self, cx: &NodeContext<'a>) -> Result<LeaseAttrs> {
        let config = VxlanConfig::from_network(cx.config)?;
        if !cx.features.vxlan {
            let what = match cx.features.net_admin {
                true => "VXLAN devices: load the module: modprobe vxlan",
                false => "the right to make VXLAN devices: run with CAP_NET_ADMIN",
            };
            return Err(Error::Unsupported {
                what: what.to_owned(),
            });
        }
        self.devices(cx, &config)?;
        let mut attrs = LeaseAttrs {
            public_ip: cx.external.public,
            backend_type: Some(self.backend_type()),
            backend_data: DualStack::default(),
        };
        // Also of a family that does not work here: Go flannel passes over a whole record that lacks
        // the data of one.
        for family in cx.config.families() {
            let data = VxlanData {
                vni: config.vni,
                vtep_mac: vtep_mac(cx, config.vni, family),
            };
            let data = data.encode().map_err(|error| Error::Other {
                what: "the backend data cannot be written".to_owned(),
                source: Some(Box::new(error)),
            })?;
            attrs.backend_data.set(family, Some(data));
        }
        Ok(attrs)
    }

    async fn register_network<'a>(
        &self,
        cx: &NodeContext<'a>,
        lease: Lease,
    ) -> Result<Arc<dyn Network>> {
        let config = VxlanConfig::from_network(cx.config)?;
        let PerFamily {
            works: mut devices,
            lacks,
        } = self.devices(cx, &config)?;
        check_lease(cx.config, &lease)?;
        for family in cx.config.families() {
            // What the lease publishes is what peers send to: the device must have just that.
            let published = lease.attrs.backend_data.get(family).map(VxlanData::decode);
            if let (Some(Ok(data)), Some(device)) = (published, devices.get_mut(family)) {
                device.mac = data.vtep_mac;
            }
        }
        let mut notes = Vec::new();
        let (checksums, note) = self.checksum_policy(cx);
        notes.push(note);
        notes.extend(mtu::note(config.mtu, cx.external));
        let (gateways, note) = Gateways::new(cx, !self.without_nexthops);
        notes.extend(note);
        let may_set = cx.features.ipv6 && cx.features.sysctls;
        Ok(Arc::new(VxlanNetwork {
            overlay: cx.overlay.clone(),
            config,
            external: cx.external.others.is_empty().then_some(cx.external.dev),
            underlay: Arc::clone(cx.underlay),
            devices,
            checksums,
            lacks,
            may_set,
            gateways,
            notes,
            lease,
        }))
    }
}

/// The MAC address of our end of the overlay: what we hold the lease with, else that of the device
/// that is there (so a node moves over from Go flannel, and a restart loses nothing), else what we
/// published last, else one derived from node and VNI, the same after any loss of state.
fn vtep_mac(cx: &NodeContext<'_>, vni: u32, family: Family) -> MacAddr {
    let published = |lease: Option<&Lease>| {
        let data = VxlanData::decode(lease?.attrs.backend_data.get(family)?).ok()?;
        Some(data.vtep_mac)
    };
    let existing = || {
        let name = device_name(family, vni)?;
        match cx.observed.objects.get(&ObjectKey::Link(name))? {
            Object::Link(Link {
                kind: LinkKind::Vxlan(vxlan),
                mac,
                ..
            }) if vxlan.vni == vni => mac.filter(MacAddr::is_unicast),
            _ => None,
        }
    };
    published(cx.held)
        .or_else(existing)
        .or_else(|| published(cx.previous))
        .unwrap_or_else(|| {
            MacAddr::local(stable_hash(
                format!("{}/{family}/{vni}", cx.node).as_bytes(),
            ))
        })
}

/// Whether a kernel release such as `5.4.0-42-generic` is below a version; `None` if it cannot be
/// read.
fn release_below(release: &str, version: (u32, u32)) -> Option<bool> {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    let (major, minor) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some((major, minor) < version)
}
