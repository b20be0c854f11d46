//! Nodes that share a pool through a real etcd.
#![allow(dead_code, unreachable_pub, reason = "shared by several test files")]

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, TlsOptions};
use flannel_e2e::{Bed, DUAL, Setup};
use flannel_subnet_etcd::{EtcdManager, EtcdOptions};
use flannel_testkit::servers::{Etcd, EtcdOptions as ServerOptions, TcpSwitch};

pub const SOON: Duration = Duration::from_secs(30);
pub const CONFIG: &str = "/coreos.com/network/config";

/// The server, and a client of it that goes past the switch.
pub struct Store {
    pub etcd: Etcd,
    pub client: Client,
}

/// A cluster whose nodes reach their etcd, each with a client of its own, through a switch.
pub async fn on_etcd(test: &str) -> Option<Bed<Store>> {
    on_etcd_with(test, ServerOptions::default(), None, |options| options).await
}

/// Of so many nodes.
pub async fn nodes_on_etcd(test: &str, nodes: usize) -> Option<Bed<Store>> {
    let server = ServerOptions::default();
    bed_of(test, nodes, server, None, |options| options).await
}

/// On a server of its own kind, whose clients need what `tls` says, with nodes whose settings are
/// tuned.
pub async fn on_etcd_with(
    test: &str,
    server: ServerOptions,
    tls: Option<TlsOptions>,
    tune: impl Fn(EtcdOptions) -> EtcdOptions + Send + Sync + 'static,
) -> Option<Bed<Store>> {
    bed_of(test, 2, server, tls, tune).await
}

async fn bed_of(
    test: &str,
    nodes: usize,
    server: ServerOptions,
    tls: Option<TlsOptions>,
    tune: impl Fn(EtcdOptions) -> EtcdOptions + Send + Sync + 'static,
) -> Option<Bed<Store>> {
    if !server.version.require(test) {
        return None;
    }
    let etcd = Etcd::with(server).expect("etcd starts");
    let options = tls.map(|tls| ConnectOptions::new().with_tls(tls));
    let client = Client::connect([etcd.endpoint()], options).await;
    let mut client = client.expect("a client");
    client.put(CONFIG, DUAL, None).await.expect("an answer");
    let switch = TcpSwitch::new(etcd.address()).await.expect("a port");
    let endpoint = etcd.endpoint();
    let (scheme, _) = endpoint.split_once("://").expect("an address");
    let endpoint = format!("{scheme}://{}", switch.address());
    let setup = Setup {
        tune: Arc::new(move |builder| {
            let options = EtcdOptions::new([&endpoint]).expect("an endpoint");
            builder.manager(EtcdManager::new(tune(options)).expect("sound settings"))
        }),
        ..Setup::new(nodes, DUAL)
    };
    Bed::start(test, setup, Store { etcd, client }, switch).await
}
