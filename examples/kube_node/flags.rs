//! The command line and the environment, and what they mean to the SDK.

use std::env;
use std::path::PathBuf;

use clap::Parser;
use flannel::{AnnotationPrefix, ConfigSource, KubeAccess, KubeOptions};

use crate::node::{Common, End};

/// Where a Pod finds its service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Runs a node with its lease on its Kubernetes Node until SIGTERM, SIGINT or the end of its time;
/// packets keep flowing afterwards. Needs CAP_NET_ADMIN in the network namespace that it is started
/// in, and root for --lab.
#[derive(Parser, Clone)]
pub(crate) struct Flags {
    /// How the API server is reached [default: in a Pod its service account, else the file that
    /// KUBECONFIG names]
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig [default: its current one]
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// The name of the Node that this is [default: NODE_NAME, else the host name]
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// The file with the network config; followed when it changes
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/kube-flannel/net-conf.json",
        conflicts_with = "net_conf_map"
    )]
    net_conf: PathBuf,
    /// A ConfigMap with the network config instead, and its key
    #[arg(long, value_name = "NAMESPACE/NAME/KEY")]
    net_conf_map: Option<String>,
    /// What the names of flannel's annotations begin with
    #[arg(
        long,
        value_name = "PREFIX",
        default_value = "flannel.alpha.coreos.com"
    )]
    annotation_prefix: String,
    /// Leave the Node's condition NetworkUnavailable alone
    #[arg(long)]
    no_condition: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

impl Flags {
    /// The name that was given for the node, by a flag or by the Pod's environment.
    pub(crate) fn node(&self) -> Option<String> {
        self.node.clone().or_else(|| variable("NODE_NAME"))
    }

    /// What is said of the API server; also in words.
    fn access(&self) -> Result<(KubeAccess, String), End> {
        let from = |file: PathBuf| {
            let words = file.display().to_string();
            (KubeAccess::kubeconfig(file, self.context.as_deref()), words)
        };
        if let Some(file) = &self.kubeconfig {
            return Ok(from(file.clone()));
        }
        if let Some(host) = variable("KUBERNETES_SERVICE_HOST") {
            let port = variable("KUBERNETES_SERVICE_PORT").unwrap_or_else(|| "443".to_owned());
            let host = if host.contains(':') {
                format!("[{host}]")
            } else {
                host
            };
            let url = format!("https://{host}:{port}");
            let (ca, token) = (format!("{ACCOUNT}/ca.crt"), format!("{ACCOUNT}/token"));
            return Ok((KubeAccess::token(&url, ca, token), url));
        }
        match variable("KUBECONFIG") {
            Some(file) => Ok(from(file.into())),
            None => Err(End::failed(
                "there is no way to an API server: give --kubeconfig, set KUBECONFIG, or run it \
                 in a Pod",
            )),
        }
    }

    pub(crate) fn kube(&self) -> Result<(KubeOptions, String), End> {
        let (access, words) = self.access()?;
        let config = match &self.net_conf_map {
            None => ConfigSource::file(&self.net_conf),
            Some(map) => {
                let mut parts = map.splitn(3, '/');
                match (parts.next(), parts.next(), parts.next()) {
                    (Some(namespace), Some(name), Some(key)) => {
                        ConfigSource::config_map(namespace, name, key)
                    }
                    _ => {
                        let rule = "--net-conf-map: must be NAMESPACE/NAME/KEY";
                        return Err(End::usage(rule));
                    }
                }
            }
        };
        let prefix = AnnotationPrefix::new(&self.annotation_prefix).map_err(End::usage)?;
        let options = KubeOptions::new(access, config, prefix);
        Ok((options.network_condition(!self.no_condition), words))
    }
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}
