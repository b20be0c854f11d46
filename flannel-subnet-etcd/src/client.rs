//! [`EtcdStore`]: the client, with endpoints that fail and files that change.

use std::fmt;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as SyncMutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{Client, ConnectOptions, WatchOptions};
use flannel_core::{Backoff, Reconnect, Rng};
use flannel_subnet_kv::{
    KeyRange, KeyValue, Layout, LeaseId, Page, PageAnswer, Store, StoreError, StoreResult, Txn,
    TxnAnswer,
};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::codec;
use crate::error::{Fault, fault};
use crate::options::EtcdOptions;
use crate::rotation::{self, Rotation};
use crate::tls::Stamp;
use crate::watch::EtcdWatch;

/// The largest answer to a transaction, and the largest message of a watch, that is taken.
const LARGEST: usize = 64 << 20;

/// The largest page that is taken: five times that of 5,000 leases. Where strangers have put such
/// large values beside leases that a page is larger, smaller ones are read.
const LARGEST_PAGE: usize = 8 << 20;

/// What the client library says of an answer above [`LARGEST`].
const TOO_LARGE: &str = "message length too large";

/// The waits between one round of all endpoints and the next, in one call.
const BETWEEN_ROUNDS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// The number that stands for no lease.
const NO_LEASE: LeaseId = LeaseId(0);

/// How many calls were made, tries on other endpoints included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Calls {
    /// Pages read.
    pub ranges: u64,
    /// Transactions.
    pub txns: u64,
    /// Leases granted, extended and revoked.
    pub leases: u64,
    /// Watches opened.
    pub watches: u64,
}

#[derive(Debug, Default)]
struct Counters {
    ranges: AtomicU64,
    txns: AtomicU64,
    leases: AtomicU64,
    watches: AtomicU64,
}

/// A client of etcd. Clones share its connections.
///
/// - One connection per endpoint, made when it is needed. Calls go to one endpoint while that
///   answers; when it refuses, fails or is silent for the
///   [`call_timeout`](EtcdOptions::call_timeout), to the next.
/// - A call that was certainly not done is made again at once on the next endpoint; so is one that
///   may be done twice. A transaction without an answer is not: its caller looks what became of it.
/// - With several endpoints, a call goes round them until it has taken the
///   [`call_timeout`](EtcdOptions::call_timeout) of all of them and one more: when one of them dies,
///   the others first have to choose a leader.
/// - When a file of certificates, or of the password, has changed, the next call goes over a new
///   connection; while what is in them cannot be used, over the one that there is.
#[derive(Clone)]
pub struct EtcdStore {
    shared: Arc<Shared>,
    counters: Arc<Counters>,
}

struct Shared {
    options: EtcdOptions,
    name: String,
    files: Vec<PathBuf>,
    rotation: SyncMutex<Rotation>,
    connections: Vec<Mutex<Option<Connection>>>,
    reconnect: Reconnect,
}

struct Connection {
    client: Client,
    stamp: Stamp,
    /// Which connections are dead: those of an earlier one.
    generation: u64,
}

/// Whether a call can be made twice.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Freely,
    OnlyIfNotDone,
}

impl EtcdStore {
    /// A client with settings that were checked. Nothing is contacted yet.
    ///
    /// # Errors
    /// [`OptionsError`](crate::OptionsError).
    pub fn new(options: EtcdOptions) -> Result<Self, crate::OptionsError> {
        options.check()?;
        // Nothing that one could go by tells nodes apart: in containers every process is number 1.
        // Those of one cluster are to begin at different endpoints and, when they all have lost
        // etcd, not to come back together.
        let chance = RandomState::new().hash_one(options.endpoints.len());
        let name = format!("{} {chance:016x}", options.endpoints.join(","));
        let count = options.endpoints.len();
        let first = chance as usize % count;
        Ok(Self {
            shared: Arc::new(Shared {
                files: options.watched_files(),
                rotation: SyncMutex::new(Rotation::new(first)),
                connections: (0..count).map(|_| Mutex::new(None)).collect(),
                reconnect: Reconnect::default(),
                name,
                options,
            }),
            counters: Arc::default(),
        })
    }

    /// A client that shares this one's connections and counts its own calls.
    #[must_use]
    pub fn counted_apart(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
            counters: Arc::default(),
        }
    }

    /// The settings.
    pub fn options(&self) -> &EtcdOptions {
        &self.shared.options
    }

    /// Where etcd is.
    pub fn endpoints(&self) -> &[String] {
        &self.shared.options.endpoints
    }

    /// The keys.
    pub fn layout(&self) -> &Layout {
        &self.shared.options.kv.layout
    }

    /// How many calls were made so far, by this client and its clones.
    pub fn calls(&self) -> Calls {
        let counters = &self.counters;
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Calls {
            ranges: of(&counters.ranges),
            txns: of(&counters.txns),
            leases: of(&counters.leases),
            watches: of(&counters.watches),
        }
    }

    fn endpoint(&self) -> usize {
        let rotation = self.shared.rotation.lock();
        rotation.unwrap_or_else(PoisonError::into_inner).current()
    }

    /// Goes on to the next endpoint.
    fn leave(&self, endpoint: usize, reason: &str) {
        let endpoints = &self.shared.options.endpoints;
        let rotation = self.shared.rotation.lock();
        let mut rotation = rotation.unwrap_or_else(PoisonError::into_inner);
        if rotation.failed(endpoint, endpoints.len()) {
            let next = endpoints.get(rotation.current());
            let failed = endpoints.get(endpoint);
            tracing::warn!(
                ?failed,
                ?next,
                reason,
                "etcd: going on to the next endpoint"
            );
        }
    }

    /// A client of one endpoint, made with the files as they are now.
    async fn client(&self, endpoint: usize) -> Result<Client, Fault> {
        let shared = &self.shared;
        let stamp = Stamp::of(&shared.files).await;
        let mut connection = shared.connections[endpoint].lock().await;
        let generation = shared.reconnect.generation();
        connection.take_if(|made| made.generation != generation);
        if let Some(made) = &*connection
            && made.stamp == stamp
        {
            return Ok(made.client.clone());
        }
        let client = match (self.connect(endpoint).await, &*connection) {
            (Ok(client), None) => client,
            (Ok(client), Some(_)) => {
                tracing::info!("etcd: certificates or password have changed, connected anew");
                client
            }
            (Err(fault), None) => return Err(fault),
            // They are being replaced, one file after the other: it will be tried with each call.
            (Err(fault), Some(made)) => {
                tracing::debug!(
                    ?fault,
                    "etcd: new certificates or password cannot be used yet"
                );
                return Ok(made.client.clone());
            }
        };
        *connection = Some(Connection {
            client: client.clone(),
            stamp,
            generation,
        });
        Ok(client)
    }

    async fn connect(&self, endpoint: usize) -> Result<Client, Fault> {
        let options = &self.shared.options;
        let endpoint = &options.endpoints[endpoint];
        let mut connect = ConnectOptions::new()
            .with_connect_timeout(options.connect_timeout)
            .with_keep_alive(options.keep_alive, options.call_timeout)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some((name, password)) = &options.user {
            let password = password.read().await.map_err(Fault::NotDone)?;
            connect = connect.with_user(name, password);
        }
        #[cfg(feature = "tls")]
        if let (true, Some(tls)) = (options.is_tls(endpoint), &options.tls) {
            connect = connect.with_tls(tls.load().await.map_err(Fault::NotDone)?);
        }
        // With a user this authenticates; without, it does nothing yet.
        let connecting = Client::connect([endpoint], Some(connect));
        let limit = options.connect_timeout + options.call_timeout;
        match timeout(limit, connecting).await {
            Ok(Ok(client)) => Ok(client),
            Ok(Err(error)) => Err(match fault(&error, NO_LEASE) {
                Fault::Unknown(reason) => Fault::NotDone(reason),
                fault => fault,
            }),
            Err(_) => Err(Fault::NotDone(format!("{endpoint} does not answer"))),
        }
    }

    /// One call, on as many endpoints as it takes.
    async fn call<T, F>(
        &self,
        counter: impl Fn(&Counters) -> &AtomicU64,
        repeat: Repeat,
        lease: LeaseId,
        act: impl Fn(Client) -> F,
    ) -> StoreResult<T>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let limit = self.shared.options.call_timeout;
        let count = self.shared.options.endpoints.len();
        let begun = Instant::now();
        let backoff = Backoff::new(BETWEEN_ROUNDS.0, BETWEEN_ROUNDS.1);
        let mut rng = Rng::from_text(&self.shared.name);
        let mut last = String::new();
        for tried in 0_u32.. {
            if !rotation::may_try(count, tried, begun.elapsed(), limit) {
                break;
            }
            // Once round, and all have refused: they may be choosing a leader.
            if count > 1 && tried > 0 && (tried as usize).is_multiple_of(count) {
                let round = tried / count as u32;
                tokio::time::sleep(backoff.after(round, &mut rng)).await;
            }
            let endpoint = self.endpoint();
            let mut dead = self.shared.reconnect.listen();
            let client = tokio::select! {
                biased;
                client = self.client(endpoint) => client,
                () = dead.told() => Err(Fault::Dead),
            };
            let answer = match client {
                Err(fault) => Err(fault),
                Ok(client) => {
                    counter(&self.counters).fetch_add(1, Ordering::Relaxed);
                    let asking = timeout(limit, act(client));
                    let answer = tokio::select! {
                        biased;
                        answer = asking => Some(answer),
                        () = dead.told() => None,
                    };
                    match answer {
                        Some(Ok(answer)) => answer.map_err(|error| fault(&error, lease)),
                        Some(Err(_)) => {
                            Err(Fault::Unknown(format!("nothing came within {limit:?}")))
                        }
                        None => Err(Fault::Dead),
                    }
                }
            };
            let fault = match answer {
                Ok(answer) => return Ok(answer),
                Err(fault) => fault,
            };
            let url = &self.shared.options.endpoints[endpoint];
            let (reason, again) = match fault {
                Fault::Answer(error) => return Err(error),
                Fault::Stranger(reason) => {
                    *self.shared.connections[endpoint].lock().await = None;
                    (reason, true)
                }
                Fault::NotDone(reason) => {
                    self.leave(endpoint, &reason);
                    (reason, true)
                }
                Fault::Dead => {
                    let reason = "the connection was bound to an address that is gone".to_owned();
                    (reason, repeat == Repeat::Freely)
                }
                Fault::Unknown(reason) => {
                    self.leave(endpoint, &reason);
                    (reason, repeat == Repeat::Freely)
                }
            };
            last = format!("{url}: {reason}");
            if !again {
                break;
            }
        }
        Err(StoreError::unavailable(last))
    }
}

impl fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdStore")
            .field("endpoints", &self.shared.options.endpoints)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for EtcdStore {
    type Watch = EtcdWatch;

    fn kind(&self) -> &'static str {
        "etcd"
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn reconnect(&self) {
        self.shared.reconnect.tell();
    }

    async fn page(&self, page: Page) -> StoreResult<PageAnswer> {
        let (from, end) = codec::bounds(&page.range);
        let answer = self.call(
            |counters| &counters.ranges,
            Repeat::Freely,
            NO_LEASE,
            |client| {
                let options = codec::page_options(&page, end.clone());
                let from = from.clone();
                async move {
                    let mut client = client.kv_client().max_decoding_message_size(LARGEST_PAGE);
                    client.get(from, Some(options)).await
                }
            },
        );
        let answer = match answer.await {
            Err(StoreError::Refused { reason }) if reason.contains(TOO_LARGE) => {
                return Err(StoreError::TooLarge);
            }
            answer => answer?,
        };
        let read = codec::answered(answer.header())?;
        let entry = |kv| KeyValue {
            omitted: page.keys_only,
            ..codec::entry(kv)
        };
        Ok(PageAnswer {
            revision: page.at.unwrap_or(read),
            entries: answer.kvs().iter().map(entry).collect(),
            more: answer.more(),
        })
    }

    async fn txn(&self, txn: Txn) -> StoreResult<TxnAnswer> {
        let lease = txn.then.iter().find_map(|op| match op {
            flannel_subnet_kv::Op::Put { lease, .. } => *lease,
            _ => None,
        });
        let answer = self.call(
            |counters| &counters.txns,
            Repeat::OnlyIfNotDone,
            lease.unwrap_or(NO_LEASE),
            |client| {
                let txn = codec::txn(&txn);
                async move {
                    let mut client = client.kv_client().max_decoding_message_size(LARGEST);
                    client.txn(txn).await
                }
            },
        );
        match answer.await {
            // It was answered, so it was done or not; which of both nobody can read.
            Err(StoreError::Refused { reason }) if reason.contains(TOO_LARGE) => Err(
                StoreError::unavailable("the answer to a transaction is too large to be read"),
            ),
            answer => codec::txn_answer(&answer?),
        }
    }

    async fn grant(&self, ttl: Duration) -> StoreResult<(LeaseId, Duration)> {
        let answer = self.call(
            |counters| &counters.leases,
            Repeat::Freely,
            NO_LEASE,
            |client| async move { client.lease_client().grant(codec::seconds(ttl), None).await },
        );
        let answer = answer.await?;
        let granted = u64::try_from(answer.ttl()).unwrap_or_default();
        Ok((codec::lease_id(answer.id()), Duration::from_secs(granted)))
    }

    async fn keep_alive(&self, lease: LeaseId) -> StoreResult<Duration> {
        let answer = self.call(
            |counters| &counters.leases,
            Repeat::Freely,
            lease,
            |client| async move {
                let number = codec::lease_number(lease);
                let (mut keeper, mut answers) = client.lease_client().keep_alive(number).await?;
                keeper.keep_alive().await?;
                answers.message().await
            },
        );
        match answer.await? {
            Some(answer) if answer.ttl() > 0 => {
                Ok(Duration::from_secs(answer.ttl().unsigned_abs()))
            }
            Some(_) => Err(StoreError::LeaseNotFound { lease }),
            None => Err(StoreError::unavailable("the lease was not answered for")),
        }
    }

    async fn revoke(&self, lease: LeaseId) -> StoreResult<()> {
        let answer = self.call(
            |counters| &counters.leases,
            Repeat::Freely,
            lease,
            |client| async move {
                client
                    .lease_client()
                    .revoke(codec::lease_number(lease))
                    .await
            },
        );
        answer.await.map(drop)
    }

    async fn watch(&self, range: KeyRange) -> StoreResult<EtcdWatch> {
        let (from, end) = codec::bounds(&range);
        let dead = self.shared.reconnect.listen();
        let stream = self.call(
            |counters| &counters.watches,
            Repeat::Freely,
            NO_LEASE,
            |client| {
                let mut options = WatchOptions::new().with_fragment().with_progress_notify();
                if let Some(end) = &end {
                    options = options.with_range(end.clone());
                }
                let from = from.clone();
                async move {
                    let mut client = client.watch_client().max_decoding_message_size(LARGEST);
                    client.watch(from, Some(options)).await
                }
            },
        );
        let stream = stream.await?;
        let limit = self.shared.options.call_timeout;
        match timeout(limit, EtcdWatch::begin(stream, dead)).await {
            Ok(watch) => watch,
            Err(_) => {
                let endpoint = self.endpoint();
                self.leave(endpoint, "a watch was not answered");
                Err(StoreError::unavailable("the watch was not answered"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn clients_with_the_same_settings_are_told_apart() {
        let store = || EtcdStore::new(EtcdOptions::new(["a:1", "b:1"]).expect("endpoints"));
        let names = [store(), store()].map(|store| store.expect("sound").name().to_owned());
        assert_ne!(names[0], names[1]);
    }

    #[test]
    fn nodes_begin_at_different_endpoints() {
        let options = EtcdOptions::new(["a:1", "b:1"]).expect("endpoints");
        let begin = || EtcdStore::new(options.clone()).expect("sound").endpoint();
        let first: BTreeSet<usize> = (0..200).map(|_| begin()).collect();
        assert_eq!(first.len(), 2);
    }
}
