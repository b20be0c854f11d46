//! The command line, and what it means to the SDK.

use std::path::PathBuf;

use clap::Parser;
use flannel::kv::Layout;
use flannel::{EtcdOptions, Password, TlsFiles};

use crate::node::{Common, End};

/// Runs a node with its lease on etcd until SIGTERM, SIGINT or the end of its time; packets keep
/// flowing afterwards. Needs CAP_NET_ADMIN in the network namespace that it is started in, and root
/// for --lab.
#[derive(Parser, Clone)]
pub(crate) struct Flags {
    /// Where etcd is
    #[arg(
        long,
        value_name = "URL,…",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:2379"
    )]
    endpoints: Vec<String>,
    /// What all keys in etcd begin with
    #[arg(long, value_name = "PREFIX", default_value = Layout::DEFAULT_PREFIX)]
    prefix: String,
    /// The node's name in the cluster [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<String>,
    /// The user that etcd knows us by
    #[arg(long, value_name = "NAME", requires = "password_file")]
    username: Option<String>,
    /// The file with the user's password; read again when it changes
    #[arg(long, value_name = "FILE", requires = "username")]
    password_file: Option<PathBuf>,
    /// The certificates of the authorities that etcd's certificate is signed by, for https://
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// Our certificate, where etcd asks for one
    #[arg(long, value_name = "FILE", requires_all = ["key_file", "ca_file"])]
    cert_file: Option<PathBuf>,
    /// The key of our certificate
    #[arg(long, value_name = "FILE", requires = "cert_file")]
    key_file: Option<PathBuf>,
    /// Take the node id, once, from another machine that holds it, whether that one lives or not; else
    /// it is refused while that one lives
    #[arg(long)]
    pub(crate) take_over: bool,
    #[command(flatten)]
    pub(crate) common: Common,
}

impl Flags {
    pub(crate) fn etcd(&self) -> Result<EtcdOptions, End> {
        let options = EtcdOptions::new(&self.endpoints).map_err(End::usage)?;
        let mut options = options.prefix(&self.prefix);
        if let (Some(name), Some(file)) = (&self.username, &self.password_file) {
            options = options.user(name, Password::file(file));
        }
        let identity = self.cert_file.clone().zip(self.key_file.clone());
        if self.ca_file.is_some() || identity.is_some() {
            options = options.tls(TlsFiles {
                ca: self.ca_file.clone(),
                identity,
                ..TlsFiles::default()
            });
        }
        Ok(options)
    }
}
