//! One forwarder on a TUN device that is there, until it is killed: to measure with.
//!
//! ```text
//! ip tuntap add flannel0 mode tun multi_queue vnet_hdr
//! ip link set flannel0 mtu 1472 up
//! ip route add 10.42.2.0/24 dev flannel0
//! forward --device flannel0 --listen 192.168.0.1:8285 --own 10.42.1.0/24 \
//!     --peer 10.42.2.0/24=192.168.0.2:8285
//! ```
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::disallowed_methods,
    reason = "a program"
)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use clap::Parser;
use flannel_backend_udp::table::TableBuilder;
use flannel_backend_udp::{
    Forwarder, InNamespace, Options, Sockets, Threads, TunnelSpec, UdpOptions, baseline,
};
use flannel_core::{DualStack, IfName, Subnet};

#[derive(Debug, Parser)]
struct Arguments {
    /// The TUN device: persistent, with several queues.
    #[arg(long)]
    device: IfName,
    /// An address to listen on; one of each family at most.
    #[arg(long, required = true)]
    listen: Vec<SocketAddr>,
    /// A subnet of this node.
    #[arg(long)]
    own: Vec<Subnet>,
    /// SUBNET=ENDPOINT of a peer.
    #[arg(long, value_parser = peer)]
    peer: Vec<(Subnet, SocketAddr)>,
    /// So many more peers, that never say a word.
    #[arg(long, default_value_t = 0)]
    idle_peers: u32,
    /// Workers.
    #[arg(long, default_value_t = 1)]
    workers: u16,
    /// Threads of a worker: 1 or 2; without it as many as the processors suggest.
    #[arg(long)]
    threads: Option<u8>,
    /// The largest inner packet.
    #[arg(long, default_value_t = 65_535)]
    mtu: u32,
    /// No large packets.
    #[arg(long)]
    no_offload: bool,
    /// Checksums are not verified before packets are merged.
    #[arg(long)]
    no_verify: bool,
    /// One packet per system call, to the first peer.
    #[arg(long)]
    baseline: bool,
    /// Counters every so many seconds.
    #[arg(long)]
    stats: Option<u64>,
}

fn peer(text: &str) -> Result<(Subnet, SocketAddr), String> {
    let (subnet, endpoint) = text.split_once('=').ok_or("write SUBNET=ENDPOINT")?;
    let subnet = subnet.parse().map_err(|error| format!("{error}"))?;
    let endpoint = endpoint.parse().map_err(|error| format!("{error}"))?;
    Ok((subnet, endpoint))
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments = Arguments::parse();
    let sockets = InNamespace::current();
    if arguments.baseline {
        let options = UdpOptions {
            buffer: Options::default().socket_buffer,
            merge: false,
            shared: false,
        };
        let queue = sockets.tun_queue(&arguments.device, false)?;
        let socket = sockets.udp(arguments.listen[0], &options)?;
        let (_, peer) = arguments.peer.first().ok_or("one peer is needed")?;
        baseline::run(&queue, socket, *peer, &AtomicBool::new(false))?;
        return Ok(());
    }
    let options = Options {
        workers: arguments.workers,
        threads: match arguments.threads {
            None => Threads::Auto,
            Some(1) => Threads::One,
            Some(_) => Threads::PerDirection,
        },
        offload: !arguments.no_offload,
        verify: !arguments.no_verify,
        ..Options::default()
    };
    let spec = TunnelSpec {
        device: arguments.device,
        listen: arguments.listen,
        own: DualStack::of_subnets(arguments.own),
        mtu: DualStack::both(arguments.mtu, arguments.mtu),
    };
    let mut peers = TableBuilder::new();
    for (subnet, endpoint) in arguments.peer {
        peers.insert(subnet, endpoint);
    }
    for number in 0..arguments.idle_peers {
        let [_, a, b, c] = number.to_be_bytes();
        let subnet = Subnet::new([100 + a, b, c, 0], 24)?;
        peers.insert(subnet, SocketAddr::from(([172, 16 + a, b, c], 8285)));
    }
    let watch = Arc::new(|report: &_| eprintln!("{report:?}"));
    let forwarder = Forwarder::start(spec, options, Arc::new(sockets), watch)?;
    forwarder.set_table(peers.build());
    eprintln!("{:?}", forwarder.capabilities());
    loop {
        std::thread::sleep(Duration::from_secs(arguments.stats.unwrap_or(3600)));
        let totals = forwarder.totals();
        let shown = totals.iter().filter(|(_, value)| *value > 0);
        let shown: Vec<String> = shown
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        println!("{}", shown.join(" "));
        for note in forwarder.capabilities().notes {
            println!("{note}");
        }
    }
}
