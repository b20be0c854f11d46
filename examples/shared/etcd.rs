//! What a user is told when etcd does not do what it should; shared by the examples that use it.

use flannel::kv::Layout;
use flannel::{EtcdStore, error_chain, manager};

/// What is wrong, and what to do.
pub(crate) fn line(store: &EtcdStore, error: &manager::Error) -> String {
    let (endpoints, layout) = (store.endpoints().join(","), store.layout());
    let why = error_chain(error);
    match error {
        manager::Error::NoConfig { .. } => format!(
            "there is no network config in etcd; put one there: \
             etcdctl --endpoints {endpoints} put {} \
             '{{ \"Network\": \"10.5.0.0/16\", \"Backend\": {{ \"Type\": \"vxlan\" }} }}'",
            layout.config(),
        ),
        manager::Error::Config(why) => format!(
            "the network config in etcd cannot be used: {}; \
             look at it: etcdctl --endpoints {endpoints} get {}",
            error_chain(why),
            layout.config(),
        ),
        manager::Error::Denied { .. } => format!(
            "etcd at {endpoints} does not let us: {why}; give --username and --password-file of a \
             user with a role that may read and write the prefix: \
             etcdctl role grant-permission ROLE readwrite --prefix=true {}",
            prefix(layout),
        ),
        error if error.is_transient() => format!(
            "etcd does not answer at {endpoints}: {why}; install one (Debian: apt-get install \
             etcd-server etcd-client) and start it (etcd --data-dir /tmp/etcd), or say with \
             --endpoints where it is"
        ),
        _ => why,
    }
}

/// What all keys begin with, as a role in etcd is to be given it.
fn prefix(layout: &Layout) -> String {
    format!("{}/", layout.prefix())
}
