//! [`UdpBackend`]: what this node publishes, and how a network is made of its lease.

use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::backend::{Error, PerFamily, Result, check_lease};
use flannel_core::{
    Backend, BackendType, DualStack, Gateways, IfName, Lease, LeaseAttrs, Network, NodeContext,
    Note, TunFault, mtu,
};

use crate::config::UdpConfig;
use crate::network::{End, UdpNetwork};

/// The UDP backend: compatible with flannel's on the wire and in the lease.
///
/// It computes objects, as all backends do; that there is somebody who carries packets is the
/// kernel's part: [`WithTunnels`](crate::WithTunnels) around the kernel of the overlay.
#[derive(Debug, Clone, Default)]
pub struct UdpBackend {
    device: Option<IfName>,
}

impl UdpBackend {
    /// The backend with its defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// The name of the TUN device, default `flannel0`: the one that Go flannel's `flannel%d` comes
    /// to, by which firewall rules and whoever looks at a node know it. Two overlays in one network
    /// namespace need two names.
    ///
    /// Go flannel itself keeps the name for as long as it runs, so that never two of them carry the
    /// packets of one node: our device is then reported as blocked, and made when Go flannel ends.
    #[must_use]
    pub const fn with_device(mut self, device: IfName) -> Self {
        self.device = Some(device);
        self
    }
}

/// The name of the TUN device unless it is set.
fn default_device() -> Option<IfName> {
    IfName::new("flannel0").ok()
}

#[async_trait]
impl Backend for UdpBackend {
    fn backend_type(&self) -> BackendType {
        BackendType::udp()
    }

    fn reaches(&self) -> Vec<BackendType> {
        // A node forwards what reaches it without a tunnel, and answers the same way.
        vec![BackendType::host_gw(), BackendType::vxlan()]
    }

    fn attrs<'a>(&self, cx: &NodeContext<'a>) -> Result<LeaseAttrs> {
        let config = UdpConfig::from_network(cx.config)?;
        check_features(cx)?;
        ends(cx, &config)?;
        Ok(LeaseAttrs {
            public_ip: cx.external.public,
            // As flannel writes it: its records of this backend carry no type and no data.
            backend_type: None,
            backend_data: DualStack::default(),
        })
    }

    async fn register_network<'a>(
        &self,
        cx: &NodeContext<'a>,
        lease: Lease,
    ) -> Result<Arc<dyn Network>> {
        let config = UdpConfig::from_network(cx.config)?;
        check_features(cx)?;
        check_lease(cx.config, &lease)?;
        let PerFamily { works, lacks } = ends(cx, &config)?;
        let (gateways, note) = Gateways::new(cx, true);
        let mut notes: Vec<Note> = note.into_iter().collect();
        notes.extend(mtu::note(config.mtu, cx.external));
        let device = self.device.or_else(default_device);
        Ok(Arc::new(UdpNetwork {
            overlay: cx.overlay.clone(),
            device: device.ok_or_else(|| Error::Other {
                what: "the TUN device has no name".to_owned(),
                source: None,
            })?,
            port: config.port,
            ends: works,
            lacks,
            gateways,
            underlay: Arc::clone(cx.underlay),
            may_set: cx.features.ipv6 && cx.features.sysctls,
            notes,
            lease,
        }))
    }
}

/// Whether packets can be carried here at all. Told before there is a lease, so that a network that
/// goes over to this backend leaves a node alone that cannot follow.
fn check_features(cx: &NodeContext<'_>) -> Result<()> {
    let lacks = if !cx.features.tun {
        let fault = cx.features.tun_fault.unwrap_or(TunFault::Other);
        format!("TUN devices: {fault}")
    } else if !cx.features.tunnels {
        "packet paths: give the overlay a kernel inside of `flannel_backend_udp::WithTunnels`"
            .to_owned()
    } else {
        return Ok(());
    };
    Err(Error::Unsupported { what: lacks })
}

/// Our ends of the tunnel, one for each family of the config.
fn ends(cx: &NodeContext<'_>, config: &UdpConfig) -> Result<PerFamily<End>> {
    PerFamily::make(cx.config, |family| {
        Ok(End {
            listen: SocketAddr::new(cx.source(family)?, config.port),
            mtu: config.inner_mtu(family, cx.external.mtu)?,
        })
    })
}
