//! [`EtcdManager`]: the subnet manager.

use async_trait::async_trait;
use flannel_core::manager::{Result, check_runtime};
use flannel_core::{Capabilities, EventStream, Lease, LeaseRequest, Manager, NetworkConfig};
use flannel_subnet_kv::KvManager;

use crate::client::EtcdStore;
use crate::options::{EtcdOptions, OptionsError};

/// Leases on etcd v3 in flannel's layout: [`KvManager`] on an [`EtcdStore`].
///
/// A dual-stack or IPv4 network can be shared with Go flanneld. A network of IPv6 alone has no key
/// in flannel's layout and is refused.
#[derive(Debug, Clone)]
pub struct EtcdManager(KvManager<EtcdStore>);

impl EtcdManager {
    /// A manager with these settings. Nothing is contacted yet: what is wrong with etcd itself comes
    /// with the calls.
    ///
    /// # Errors
    /// [`OptionsError`] says which setting is wrong.
    pub fn new(options: EtcdOptions) -> std::result::Result<Self, OptionsError> {
        Ok(Self::on(EtcdStore::new(options)?))
    }

    /// A manager on a client that is there already: those of several nodes, or of several overlays
    /// of one prefix, can share its connections.
    pub fn on(store: EtcdStore) -> Self {
        let kv = store.options().kv.clone();
        Self(KvManager::new(store, kv))
    }

    /// The client.
    pub const fn store(&self) -> &EtcdStore {
        self.0.store()
    }
}

#[async_trait]
#[deny(
    clippy::missing_trait_methods,
    reason = "all of it is the other manager's"
)]
impl Manager for EtcdManager {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    async fn network_config(&self) -> Result<NetworkConfig> {
        check_runtime()?;
        self.0.network_config().await
    }

    async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease> {
        check_runtime()?;
        self.0.acquire_lease(request).await
    }

    async fn renew_lease(&self, lease: &Lease) -> Result<Lease> {
        check_runtime()?;
        self.0.renew_lease(lease).await
    }

    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        check_runtime()?;
        self.0.release_lease(lease).await
    }

    fn watch_leases(&self) -> EventStream {
        self.0.watch_leases()
    }

    fn reconnect(&self) {
        self.0.reconnect();
    }
}
