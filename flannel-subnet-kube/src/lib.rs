//! [`KubeManager`]: leases on the Nodes of a Kubernetes cluster, in flannel's own annotations, so
//! that Go `flanneld` and programs built on this SDK share one cluster.
//!
//! ```no_run
//! use flannel_subnet_kube::{Access, AnnotationPrefix, ConfigSource, KubeManager, KubeOptions};
//!
//! # fn main() -> Result<(), flannel_subnet_kube::OptionsError> {
//! let access = Access::kubeconfig("/etc/kubernetes/kubelet.conf", None);
//! let config = ConfigSource::file("/etc/kube-flannel/net-conf.json");
//! let options = KubeOptions::new(access, config, AnnotationPrefix::default());
//! let manager = KubeManager::new(options)?; // nothing is contacted yet
//! # Ok(())
//! # }
//! ```
//!
//! The node id that an overlay is built with is the name of its Node. What the service account
//! needs, and nothing else:
//!
//! ```yaml
//! rules:
//! - apiGroups: [""]
//!   resources: ["nodes"]
//!   verbs: ["get", "list", "watch"]
//! - apiGroups: [""]
//!   resources: ["nodes/status"]
//!   verbs: ["patch"]
//! ```
//!
//! and `get` on the ConfigMap, if the config is read from one ([`ConfigSource::ConfigMap`]).
//!
//! A program in whose build nothing else chooses a version of Kubernetes' API types
//! (`k8s-openapi`) turns on the feature `k8s-latest`.
#![forbid(unsafe_code)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod access;
mod calls;
mod event;
mod failure;
mod list_watch;
mod manager;
mod node;
mod options;
mod prefix;
pub mod record;
mod shared;
mod split;

/// The client that [`Access::client`] takes.
pub use kube::Client;

pub use access::Access;
pub use event::KubeEvent;
pub use manager::{KubeManager, NodeSettings};
pub use node::{Annotations, NodeError, NodeView};
pub use options::{ConfigSource, KubeOptions, OptionsError};
pub use prefix::{Annotation, AnnotationPrefix};
pub use split::{SplitError, Splitter};
