//! The nodes: all ask at once, each as a node does that starts.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use flannel::kv::{KeyRange, Op, Store as _, StoreError, Txn};
use flannel::{
    BackendData, BackendType, Backoff, DualStack, EtcdManager, EtcdOptions, EtcdStore, LeaseAttrs,
    LeaseRequest, Manager, NodeId, OptionsError, PublicIp, Rng, Subnet, error_chain, wire,
};
use tokio::sync::{Barrier, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::pool::Pool;
use crate::progress::Progress;
use crate::{Error, Flags, explain, layout};

/// After this long a node without a lease counts as failed.
const LIMIT: Duration = Duration::from_secs(60);

/// How long etcd may take to answer at the start.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a call may take: all nodes share the processors of one machine, and etcd does too.
const CALL: Duration = Duration::from_secs(20);

/// How long the leases last: they are removed at the end, or end soon after a crash.
const TTL: Duration = Duration::from_secs(600);

/// How one node fared.
pub(crate) struct Joined {
    /// What it holds, or why it holds nothing.
    pub(crate) lease: Result<DualStack<Subnet>, String>,
    /// From its first call until it held the lease.
    pub(crate) took: Duration,
    /// Its transactions.
    pub(crate) txns: u64,
    /// How often it was told to come again, and did.
    pub(crate) retries: u32,
}

pub(crate) fn options(endpoints: &[String]) -> Result<EtcdOptions, OptionsError> {
    let options = EtcdOptions::new(endpoints)?
        .prefix(layout().prefix())
        .ttl(TTL)
        .call_timeout(CALL);
    EtcdStore::new(options.clone())?;
    Ok(options)
}

/// Writes the network config where nothing else is.
pub(crate) async fn prepare(hand: &EtcdStore, pool: &Pool) -> Result<(), Error> {
    let everything = KeyRange::prefix(format!("{}/", hand.layout().prefix()));
    let config = Op::put(hand.layout().config(), pool.config(), None);
    let start = Instant::now();
    // etcd takes no transaction that deletes and writes one key.
    for op in [Op::Delete(everything), config] {
        let txn = Txn {
            then: vec![op],
            ..Txn::default()
        };
        while let Err(error) = hand.txn(txn.clone()).await {
            // An etcd of our own listens a little before it serves.
            let is_brief = matches!(error, StoreError::Unavailable { .. });
            if !is_brief || start.elapsed() >= PATIENCE {
                return Err(explain::line(hand, &error.into()).into());
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
    Ok(())
}

/// Lets all nodes join.
pub(crate) async fn join(
    flags: &Flags,
    options: EtcdOptions,
    progress: &Arc<Progress>,
) -> Result<Vec<Joined>, Error> {
    let count = flags.nodes as usize;
    let connections = (flags.connections as usize).min(count);
    let clients: Vec<EtcdStore> = (0..connections)
        .map(|_| EtcdStore::new(options.clone()))
        .collect::<Result<_, _>>()?;
    // Connected beforehand: a thousand handshakes are not what is measured.
    for client in &clients {
        client.range(KeyRange::key(layout().config())).await?;
    }
    let turns = Arc::new(Semaphore::new(
        flags.concurrency.map_or(count, |n| n as usize),
    ));
    let start = Arc::new(Barrier::new(count));
    let mut nodes = JoinSet::new();
    for number in 0..flags.nodes {
        let client = clients[number as usize % connections].counted_apart();
        let request = request(number)?;
        let (turns, start) = (Arc::clone(&turns), Arc::clone(&start));
        let progress = Arc::clone(progress);
        nodes.spawn(async move {
            start.wait().await;
            let _turn = turns.acquire().await;
            let joined = acquire(client, &request).await;
            progress.joined(joined.lease.is_ok());
            joined
        });
    }
    Ok(nodes.join_all().await)
}

/// What an agent does when it starts: ask, and come again after what may pass.
async fn acquire(client: EtcdStore, request: &LeaseRequest) -> Joined {
    let manager = EtcdManager::on(client.clone());
    let backoff = Backoff::new(Duration::from_millis(250), Duration::from_secs(10));
    let mut rng = Rng::from_text(request.node.as_str());
    let start = Instant::now();
    let mut retries = 0;
    let lease = loop {
        match manager.acquire_lease(request).await {
            Ok(lease) => break Ok(lease.subnet),
            Err(error) if error.is_transient() && start.elapsed() < LIMIT => {
                retries += 1;
                sleep(backoff.after(retries, &mut rng)).await;
            }
            Err(error) => break Err(error_chain(&error)),
        }
    };
    Joined {
        lease,
        took: start.elapsed(),
        txns: client.calls().txns,
        retries,
    }
}

/// What a VXLAN node asks for.
fn request(number: u32) -> Result<LeaseRequest, Error> {
    let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 1)) + number);
    let [_, _, b, c, d] = [
        0,
        0,
        (number >> 16) as u8,
        (number >> 8) as u8,
        number as u8,
    ];
    let data = format!(r#"{{"VNI":1,"VtepMAC":"0e:00:00:{b:02x}:{c:02x}:{d:02x}"}}"#);
    let mut public_ip = PublicIp::default();
    public_ip.set_ip(ip.into());
    Ok(LeaseRequest::new(
        NodeId::new(format!("node-{number}"))?,
        LeaseAttrs {
            public_ip,
            backend_type: Some(BackendType::vxlan()),
            backend_data: DualStack::v4(BackendData::from_json(&data)?),
        },
    ))
}

/// The subnets of all records that are in etcd at the end.
pub(crate) async fn records(hand: &EtcdStore) -> Result<Vec<DualStack<Subnet>>, Error> {
    let layout = hand.layout();
    let found = hand.range(layout.range()).await?.entries;
    let records = found.iter().filter(|entry| layout.is_record(&entry.key));
    let subnets = records.map(|entry| wire::parse_subnet_key(&entry.key));
    Ok(subnets.collect::<Result<_, _>>()?)
}
