//! The command line, and what it means to the SDK.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use flannel::kv::Layout;
use flannel::{
    EtcdOptions, IfName, Interface, LossPolicy, NodeId, Password, TlsFiles, UnderlayOptions,
};

use crate::End;

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
    node: Option<String>,
    /// The external interface, by name or by one of its addresses [default: that of the default
    /// route]
    #[arg(long, value_name = "NAME|ADDR")]
    iface: Option<String>,
    /// The address that peers are told, one per family [default: that of the external interface]
    #[arg(long, value_name = "ADDR,…", value_delimiter = ',')]
    public_ip: Vec<IpAddr>,
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
    /// At the end, give the lease up and remove what is ours; else packets keep flowing
    #[arg(long)]
    pub(crate) teardown: bool,
    /// Print a line about the state every so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    status_every: Option<u64>,
    /// Stop after so many seconds
    #[arg(long, value_name = "SECONDS")]
    run_for: Option<u64>,
    /// What to do when the lease is lost
    #[arg(long, value_enum, default_value_t = OnLoss::Reacquire)]
    on_lease_lost: OnLoss,
    /// Run the node in a namespace LAB-NODE of its own with a pod behind it, on the underlay of all
    /// nodes of this lab; the last node to stop removes the lab
    #[arg(long, value_name = "LAB")]
    pub(crate) lab: Option<String>,
    /// Leave the lab as it is at the end, and print how to look at it and how to remove it
    #[arg(long, requires = "lab", conflicts_with = "teardown")]
    pub(crate) keep: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnLoss {
    /// Keep everything as it is
    Hold,
    /// Ask for a lease again, for the same subnet if it is free
    Reacquire,
    /// End; packets keep flowing as far as the kernel knows the way
    Stop,
}

impl Flags {
    pub(crate) fn node(&self) -> Result<NodeId, End> {
        let name = match &self.node {
            Some(name) => name.clone(),
            None => std::fs::read_to_string("/proc/sys/kernel/hostname")
                .map_err(|error| End::failed(format!("the host name: {error}: give --node")))?,
        };
        NodeId::new(name.trim()).map_err(|error| End::usage(format!("--node: {error}")))
    }

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

    pub(crate) fn underlay(&self) -> Result<UnderlayOptions, End> {
        let mut options = UnderlayOptions::default();
        if let Some(text) = &self.iface {
            let interface = match text.parse::<IpAddr>() {
                Ok(ip) => Interface::Address(ip),
                Err(_) => Interface::Name(
                    IfName::new(text).map_err(|error| End::usage(format!("--iface: {error}")))?,
                ),
            };
            options.interfaces.push(interface);
        }
        for ip in &self.public_ip {
            options.public_ip.set_ip(*ip);
        }
        if options.public_ip.ips().count() < self.public_ip.len() {
            return Err(End::usage("--public-ip: one address per family"));
        }
        Ok(options)
    }

    pub(crate) const fn loss_policy(&self) -> LossPolicy {
        match self.on_lease_lost {
            OnLoss::Hold => LossPolicy::Hold,
            OnLoss::Reacquire => LossPolicy::Reacquire,
            OnLoss::Stop => LossPolicy::Stop,
        }
    }

    pub(crate) fn run_for(&self) -> Option<Duration> {
        self.run_for.map(Duration::from_secs)
    }

    pub(crate) fn status_every(&self) -> Option<Duration> {
        self.status_every.map(Duration::from_secs)
    }
}
