//! A node in a terminal, whatever its store is; shared by the examples that are one.

mod holder;
mod keeper;
mod path;
mod place;
mod serve;
mod socket;
mod tell;

use std::future::Future;
use std::io::IsTerminal;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use flannel::{IfName, Interface, LossPolicy, NodeId, PublicIp, UnderlayOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep_until};
use tracing_subscriber::EnvFilter;

pub(crate) use keeper::keep;
pub(crate) use place::{Place, check_rights};
pub(crate) use serve::serve;
#[allow(unused_imports, reason = "not every store has news of its own")]
pub(crate) use tell::say;

/// How long a store may take to answer at the start: it may be starting, too.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Why it ends with another exit code than 0: the code and one line.
#[derive(Debug)]
pub(crate) struct End {
    code: u8,
    why: String,
}

impl End {
    /// Something failed.
    pub(crate) fn failed(why: impl ToString) -> Self {
        Self {
            code: 1,
            why: why.to_string(),
        }
    }

    /// The flags cannot be used.
    pub(crate) fn usage(why: impl ToString) -> Self {
        Self {
            code: 2,
            why: why.to_string(),
        }
    }

    /// It ran to the end and found a problem.
    pub(crate) fn problem(why: impl ToString) -> Self {
        Self {
            code: 3,
            why: why.to_string(),
        }
    }
}

/// What a node is whatever its store is.
#[derive(Args, Clone)]
pub(crate) struct Common {
    /// The external interface, by name or by one of its addresses [default: that of the default
    /// route]
    #[arg(long, value_name = "NAME|ADDR")]
    iface: Option<String>,
    /// The address that peers are told, one per family [default: that of the external interface]
    #[arg(long, value_name = "ADDR,…", value_delimiter = ',')]
    public_ip: Vec<IpAddr>,
    /// At the end, give the lease up and remove what is ours; else packets keep flowing
    #[arg(long)]
    pub(crate) teardown: bool,
    /// Print a line about the state every so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    status_every: Option<u64>,
    /// Give up if it has not got ready in so many seconds, and say what is in the way [default: wait]
    #[arg(long, value_name = "SECONDS")]
    ready_within: Option<u64>,
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
    /// Where a packet path in user space (the UDP backend's) is handed over without losing a packet:
    /// a node that is started takes it over, one that stops leaves it to a process that keeps it.
    /// Nobody else may be able to write to its folder [default: /run/flannel/NODE.sock, in a lab
    /// /run/flannel/LAB-NODE.sock]. Given, a node listens there with every backend, and one that is
    /// started with the same socket replaces it; any other one in this network namespace is refused
    #[arg(long, value_name = "SOCKET")]
    handover: Option<PathBuf>,
    /// The time that the process which is left with the packets carries them. Then, or when it is
    /// killed, the device goes, and its routes with it
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    hold_for: u64,
    /// At the end, leave nothing of the packet path: no device, no route, no process that keeps
    /// packets. The lease is kept. What comes next, such as Go flannel, finds nothing in its way;
    /// packets are lost until it is ready
    #[arg(long)]
    pub(crate) release_path: bool,
    /// Keep the packet path of a node that has stopped
    #[arg(long, hide = true)]
    pub(crate) hold: bool,
    /// Take the node id from another machine that holds it: of the store's own flags.
    #[arg(skip)]
    pub(crate) take_over: bool,
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

impl Common {
    /// What is said of the underlay: by flags, else by whoever knows the host from elsewhere.
    pub(crate) fn underlay(&self, told: PublicIp) -> Result<UnderlayOptions, End> {
        let mut options = UnderlayOptions::default().public_ip(told);
        if let Some(text) = &self.iface {
            let interface = match text.parse::<IpAddr>() {
                Ok(ip) => Interface::Address(ip),
                Err(_) => Interface::Name(
                    IfName::new(text).map_err(|error| End::usage(format!("--iface: {error}")))?,
                ),
            };
            options.interfaces.push(interface);
        }
        let mut given = PublicIp::default();
        for ip in &self.public_ip {
            given.set_ip(*ip);
            options.public_ip.set_ip(*ip);
        }
        if given.ips().count() < self.public_ip.len() {
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

    pub(crate) fn ready_within(&self) -> Option<Duration> {
        self.ready_within.map(Duration::from_secs)
    }

    pub(crate) const fn hold_for(&self) -> Duration {
        Duration::from_secs(self.hold_for)
    }

    pub(crate) fn status_every(&self) -> Option<Duration> {
        self.status_every.map(Duration::from_secs)
    }
}

/// The name of the node: the given one, else that of the host.
pub(crate) fn node(name: Option<&str>) -> Result<NodeId, End> {
    let name = match name {
        Some(name) => name.to_owned(),
        None => std::fs::read_to_string("/proc/sys/kernel/hostname")
            .map_err(|error| End::failed(format!("the host name: {error}: give --node")))?,
    };
    NodeId::new(name.trim()).map_err(|error| End::usage(format!("--node: {error}")))
}

/// Sends logs to stderr, as `RUST_LOG` says, or as `usual` says where it is not set.
pub(crate) fn log(usual: &str) {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| usual.into()))
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
}

/// The exit code, and on stderr why it is another than 0.
pub(crate) fn exit(program: &str, end: Result<(), End>) -> ExitCode {
    match end {
        Ok(()) => ExitCode::SUCCESS,
        Err(end) => {
            eprintln!("{program}: {}", end.why);
            ExitCode::from(end.code)
        }
    }
}

/// What ends the program in good order: SIGTERM, SIGINT, or the end of its time.
pub(crate) struct Stop {
    terminate: Signal,
    interrupt: Signal,
    at: Option<Instant>,
}

impl Stop {
    pub(crate) fn new(run_for: Option<Duration>) -> Result<Self, End> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(End::failed)?,
            interrupt: signal(SignalKind::interrupt()).map_err(End::failed)?,
            at: run_for.map(|time| Instant::now() + time),
        })
    }

    /// Waits until it is to stop.
    pub(crate) fn asked(&mut self) -> impl Future<Output = ()> + Send {
        let at = self.at;
        let time_is_up = async move {
            match at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        async {
            tokio::select! {
                _ = self.terminate.recv() => {}
                _ = self.interrupt.recv() => {}
                () = time_is_up => {}
            }
        }
    }

    /// Whether its time is up.
    pub(crate) fn time_is_up(&self) -> bool {
        self.at.is_some_and(|at| Instant::now() >= at)
    }
}
