//! The process: start, watch, renew, end.

use std::time::Duration;

use flannel_core::{
    Backoff, DualStack, MacAddr, NetworkConfig, PoolMode, PublicIp, Revision, Rng, Subnet,
    stable_hash,
};
use tokio::time::Instant;

use super::leases::{LeaseWatcher, Panic, Told, allocate, is_compatible};
use super::record::{GoLease, KeyNets, parse, parse_key};
use super::vxlan::{Effect, GoMode, effect};
use super::{GoOptions, GoState, GoView, vxlan_value};
use crate::fake_store::{
    Compare, KeyEvent, KeyRange, KeyValue, LeaseId, LinkWatch, Op, StoreError, StoreLink,
    StoreResult, Txn, WatchAnswer,
};

/// The wait between two tries to read the config.
const CONFIG_RETRY: Duration = Duration::from_secs(1);
/// The wait after a failed renewal.
const RENEW_RETRY: Duration = Duration::from_secs(60);
/// The waits before a broken watch is opened again.
const FIRST_RECONNECT: Duration = Duration::from_millis(100);
const MOST_RECONNECT: Duration = Duration::from_secs(5);

/// A node that acts as Go flanneld with etcd and VXLAN.
///
/// It is driven by [`run`](Self::run) in a task of its own, or step by step by
/// [`step`](Self::step). Dropping it is killing it: what it wrote stays. A [`view`](Self::view)
/// stays valid; to start it again on the same host give a new one the old one's
/// [subnet](GoView::subnet) as previous and its [routes](Self::with_routes).
#[derive(Debug)]
pub struct GoPeer {
    link: StoreLink,
    public_ip: PublicIp,
    macs: [MacAddr; 2],
    options: GoOptions,
    rng: Rng,
    view: GoView,
    running: Option<Running>,
}

/// What there is once it has a lease.
#[derive(Debug)]
struct Running {
    mode: GoMode,
    key: String,
    value: String,
    watcher: LeaseWatcher,
    peers: Watched,
    own: Watched,
    /// When the lease is renewed; never again, if its watch has ended.
    renew_at: Option<Instant>,
}

/// A watch that is opened again when it breaks.
#[derive(Debug)]
struct Watched {
    range: KeyRange,
    /// None while it is broken, and after it has ended.
    watch: Option<LinkWatch>,
    /// From where it goes on.
    next: Revision,
    /// When it is opened again; `None` once it has ended for good.
    reopen_at: Option<Instant>,
    failures: u32,
}

/// Why the process ends.
enum End {
    Panic(String),
    Exit(i32, String),
}

impl From<Panic> for End {
    fn from(Panic(why): Panic) -> Self {
        Self::Panic(why)
    }
}

impl GoPeer {
    /// A node that reaches the store over this link. Its name decides its MAC addresses.
    pub fn new(link: StoreLink, name: &str, public_ip: PublicIp, options: GoOptions) -> Self {
        let mac = |family: &str| MacAddr::local(stable_hash(format!("{name} {family}").as_bytes()));
        Self {
            link,
            public_ip,
            macs: [mac("v4"), mac("v6")],
            rng: Rng::new(options.seed ^ stable_hash(name.as_bytes())),
            options,
            view: GoView::new(std::collections::BTreeSet::new()),
            running: None,
        }
    }

    /// The same on a host that has these routes of an earlier run, which nobody removes.
    #[must_use]
    pub fn with_routes(mut self, routes: std::collections::BTreeSet<Subnet>) -> Self {
        self.view = GoView::new(routes);
        self
    }

    /// What can be seen of it from outside.
    pub fn view(&self) -> GoView {
        self.view.clone()
    }

    /// How it is.
    pub fn state(&self) -> GoState {
        self.view.state()
    }

    /// The subnets that its kernel has routes to.
    pub fn routes(&self) -> std::collections::BTreeSet<Subnet> {
        self.view.routes()
    }

    /// Runs until the process ends.
    ///
    /// # Cancel safety
    /// Dropping the future kills the process.
    pub async fn run(mut self) {
        while self.state().is_alive() {
            self.advance(true).await;
        }
    }

    /// Does what there is to do: starts, or takes what the watches have delivered by now and
    /// renews if that is due. It waits for the store's answers as long as they take.
    ///
    /// # Cancel safety
    /// Not cancel safe: dropping the future is as killing the process, which must not be used any
    /// more.
    pub async fn step(&mut self) {
        while self.state().is_alive() && self.advance(false).await {}
    }

    /// Does one thing; says whether there was anything to do. Waits for it if told so.
    async fn advance(&mut self, wait: bool) -> bool {
        let Some(mut running) = self.running.take() else {
            let started = self.start().await;
            match started {
                Ok(running) => self.running = Some(running),
                Err(end) => self.end(end),
            }
            return true;
        };
        let result = self.proceed(&mut running, wait).await;
        self.running = Some(running);
        result.unwrap_or_else(|end| {
            self.end(end);
            true
        })
    }

    fn end(&self, end: End) {
        self.view.lock().state = match end {
            End::Panic(why) => GoState::Crashed { why },
            End::Exit(code, why) => GoState::Exited { code, why },
        };
    }

    // Start

    async fn start(&mut self) -> Result<Running, End> {
        let config = loop {
            match self.config().await {
                Some(config) => break config,
                None => tokio::time::sleep(CONFIG_RETRY).await,
            }
        };
        let pools = config.pools();
        let mode = match (pools.v4.is_some(), pools.v6.is_some()) {
            (true, false) => GoMode::V4,
            (true, true) => GoMode::Dual,
            (false, _) => {
                let why = "IPv6 alone does not work on etcd";
                return Err(End::Exit(1, why.to_owned()));
            }
        };
        let macs = self.macs.map(|mac| mac.to_string());
        let value = vxlan_value(mode, &self.public_ip, [&macs[0], &macs[1]]);
        let (key, own) = self.acquire(mode, &config, &value).await?;
        {
            let mut shared = self.view.lock();
            shared.subnet = own.taken();
            shared.state = GoState::Running;
        }
        let ttl = self.options.ttl;
        let mut running = Running {
            mode,
            watcher: LeaseWatcher::new(own),
            peers: Watched::new(KeyRange::prefix(self.subnets())),
            own: Watched::new(KeyRange::prefix(&key)),
            renew_at: Some(self.renewal(Some(ttl))),
            key,
            value,
        };
        // If the first reading fails, the node is deaf for ever; if that of its own key does, it
        // renews no more.
        match self.list().await {
            Ok((leases, revision)) => {
                self.reset(&mut running, leases)?;
                running.peers.begin(revision);
            }
            Err(error) => tracing::warn!(%error, "deaf for ever"),
        }
        match self.link.range(KeyRange::key(&running.key)).await {
            Ok(answer) => {
                running.own.begin(answer.revision);
                match answer.entries.into_iter().next() {
                    Some(entry) => self.own_written(&mut running, entry).await,
                    None => running.renew_at = None,
                }
            }
            Err(_) => running.renew_at = None,
        }
        Ok(running)
    }

    fn subnets(&self) -> String {
        format!("{}/subnets", self.options.prefix)
    }

    async fn config(&self) -> Option<NetworkConfig> {
        let key = KeyRange::key(format!("{}/config", self.options.prefix));
        let entry = self.link.range(key).await.ok()?.entries.pop()?;
        let text = String::from_utf8_lossy(&entry.value);
        NetworkConfig::from_json(&text, PoolMode::Allocated).ok()
    }

    /// Every lease that it can read. Asks for the time to live of each.
    async fn list(&self) -> StoreResult<(Vec<GoLease>, Revision)> {
        let answer = self.link.range(KeyRange::prefix(self.subnets())).await?;
        let mut leases = Vec::new();
        for entry in answer.entries {
            let asked = self.time_to_live(&entry).await;
            if let (Ok(_), Ok(lease)) = (asked, parse(&entry.key, &entry.value)) {
                leases.push(lease);
            }
        }
        Ok((leases, answer.revision))
    }

    /// The time that a record has left; `None` if none or no lease.
    async fn time_to_live(&self, entry: &KeyValue) -> StoreResult<Option<Duration>> {
        let lease = entry.lease.unwrap_or(LeaseId(0));
        self.link.time_to_live(lease).await
    }

    async fn acquire(
        &mut self,
        mode: GoMode,
        config: &NetworkConfig,
        value: &str,
    ) -> Result<(String, GoLease), End> {
        let failed = |error: StoreError| End::Exit(1, format!("failed to acquire lease: {error}"));
        let (leases, _) = self.list().await.map_err(failed)?;
        let ip = self.public_ip.v4;
        let same_ip = leases.iter().find(|l| Some(l.attrs.public_ip) == ip);
        if let Some(lease) = same_ip {
            let key = self.key(&(lease.v4, lease.v6));
            if is_compatible(config, lease) {
                self.write(&key, value).await.map_err(failed)?;
                return own(key, value);
            }
            // The list with this lease in it is used all the same.
            let gone = vec![Op::delete(key)];
            self.txn(Vec::new(), gone).await.map_err(failed)?;
        }
        let nets = match self.previous(config, &leases) {
            Some(nets) => nets,
            None => allocate(mode, config, &leases, &mut self.rng)?
                .ok_or_else(|| End::Exit(1, "out of subnets".to_owned()))?,
        };
        let key = self.key(&nets);
        if !self.create(&key, value).await.map_err(failed)? {
            // The ten tries that are meant for this case never run.
            return Err(End::Exit(1, "subnet already exists".to_owned()));
        }
        own(key, value)
    }

    /// The key of these nets, as Go flannel spells them.
    fn key(&self, (v4, v6): &KeyNets) -> String {
        let mut key = format!("{}/{}-{}", self.subnets(), v4.ip, v4.len);
        if let Some(v6) = v6 {
            key += &format!("&{}-{}", v6.ip, v6.len);
        }
        key
    }

    /// The subnets of the subnet file, if they may be used and no lease has just that IPv4 subnet.
    fn previous(&self, config: &NetworkConfig, leases: &[GoLease]) -> Option<KeyNets> {
        let previous = self.options.previous;
        let nets = parse_key(&wire_key(&previous)?)?;
        let taken = leases.iter().any(|lease| lease.v4 == nets.0);
        let lease = GoLease {
            v4: nets.0,
            v6: nets.1,
            attrs: super::GoAttrs::default(),
        };
        (!taken && is_compatible(config, &lease)).then_some(nets)
    }

    async fn txn(&self, compares: Vec<Compare>, then: Vec<Op>) -> StoreResult<bool> {
        let txn = Txn {
            compares,
            then,
            ..Txn::default()
        };
        Ok(self.link.txn(txn).await?.succeeded)
    }

    /// Makes a key that is not there.
    async fn create(&self, key: &str, value: &str) -> StoreResult<bool> {
        let (lease, _) = self.link.grant(self.options.ttl).await?;
        let absent = Compare::absent(KeyRange::key(key));
        let created = self
            .txn(vec![absent], vec![Op::put(key, value, Some(lease))])
            .await;
        if !matches!(created, Ok(true)) {
            self.link.revoke(lease).await.ok();
        }
        created
    }

    /// Writes a key, whatever is there.
    async fn write(&self, key: &str, value: &str) -> StoreResult<()> {
        let (lease, _) = self.link.grant(self.options.ttl).await?;
        let written = self
            .txn(Vec::new(), vec![Op::put(key, value, Some(lease))])
            .await;
        if written.is_err() {
            self.link.revoke(lease).await.ok();
        }
        written.map(drop)
    }

    /// When a lease with this much time left is renewed: at once, if it has none.
    fn renewal(&self, left: Option<Duration>) -> Instant {
        let left = left.unwrap_or_default();
        Instant::now() + left.saturating_sub(self.options.renew_margin)
    }

    // Run

    async fn proceed(&mut self, running: &mut Running, wait: bool) -> Result<bool, End> {
        let now = Instant::now();
        if running.renew_at.is_some_and(|at| at <= now) {
            let renewed = self.write(&running.key, &running.value).await;
            running.renew_at = Some(match renewed {
                Ok(()) => self.renewal(Some(self.options.ttl)),
                Err(_) => Instant::now() + RENEW_RETRY,
            });
            return Ok(true);
        }
        running.peers.reopen(&self.link, &mut self.rng).await;
        running.own.reopen(&self.link, &mut self.rng).await;
        if let Some(answer) = running.peers.ready() {
            self.peers_said(running, answer).await?;
            return Ok(true);
        }
        if let Some(answer) = running.own.ready() {
            self.own_said(running, answer).await?;
            return Ok(true);
        }
        if !wait {
            return Ok(false);
        }
        let Running { peers, own, .. } = running;
        let timers = [peers.reopen_at, own.reopen_at, running.renew_at];
        let timer = async {
            match timers.into_iter().flatten().min() {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        enum Said {
            Peers(StoreResult<WatchAnswer>),
            Own(StoreResult<WatchAnswer>),
            Nothing,
        }
        let said = tokio::select! {
            biased;
            answer = peers.next() => Said::Peers(answer),
            answer = own.next() => Said::Own(answer),
            () = timer => Said::Nothing,
        };
        match said {
            Said::Peers(answer) => self.peers_said(running, answer).await?,
            Said::Own(answer) => self.own_said(running, answer).await?,
            Said::Nothing => {}
        }
        Ok(true)
    }

    async fn peers_said(
        &mut self,
        running: &mut Running,
        answer: StoreResult<WatchAnswer>,
    ) -> Result<(), End> {
        let (events, revision) = match answer {
            Ok(WatchAnswer::Events { events, revision }) => (events, revision),
            Ok(WatchAnswer::Progress { .. }) => return Ok(()),
            Err(StoreError::Compacted { .. }) => {
                match self.list().await {
                    Ok((leases, revision)) => {
                        self.reset(running, leases)?;
                        running.peers.begin(revision);
                    }
                    Err(_) => running.peers.broke(&mut self.rng),
                }
                return Ok(());
            }
            Err(_) => {
                running.peers.broke(&mut self.rng);
                return Ok(());
            }
        };
        running.peers.heard(revision);
        for event in events {
            self.event(running, event).await?;
        }
        Ok(())
    }

    /// One write among those of all keys that begin with `<prefix>/subnets`.
    async fn event(&self, running: &mut Running, event: KeyEvent) -> Result<(), End> {
        let told = match event {
            KeyEvent::Put(entry) => {
                let lease = match parse(&entry.key, &entry.value) {
                    Ok(lease) => lease,
                    Err(why) => return self.empty(running, entry.key, true, why),
                };
                if let Err(error) = self.time_to_live(&entry).await {
                    let why = format!("no time to live: {error}");
                    return self.empty(running, entry.key, false, why);
                }
                running.watcher.added(lease)?
            }
            KeyEvent::Delete { key, .. } => match parse_key(&key) {
                Some(nets) => running.watcher.removed(nets)?,
                None => {
                    let why = "what was deleted is no lease".to_owned();
                    return self.empty(running, key, true, why);
                }
            },
        };
        self.apply(running.mode, told)
    }

    /// What cannot be read is taken for a snapshot of nothing.
    fn empty(
        &self,
        running: &mut Running,
        key: String,
        unreadable: bool,
        why: String,
    ) -> Result<(), End> {
        self.view.lock().state = GoState::Emptied {
            key,
            unreadable,
            why,
        };
        self.reset(running, Vec::new())
    }

    fn reset(&self, running: &mut Running, leases: Vec<GoLease>) -> Result<(), End> {
        let told = running.watcher.reset(leases)?;
        self.apply(running.mode, told)
    }

    /// What the backend does to the kernel.
    fn apply(&self, mode: GoMode, told: impl IntoIterator<Item = Told>) -> Result<(), End> {
        for told in told {
            let (Told::Added(lease) | Told::Removed(lease)) = &told;
            let subnets = match effect(mode, lease) {
                Effect::Routes(subnets, _) => subnets,
                Effect::Crash(why) => return Err(End::Panic(why)),
            };
            let mut shared = self.view.lock();
            for subnet in subnets {
                match told {
                    Told::Added(_) => shared.routes.insert(subnet),
                    Told::Removed(_) => shared.routes.remove(&subnet),
                };
            }
        }
        Ok(())
    }

    /// Something about a key that begins as the own key.
    async fn own_said(
        &mut self,
        running: &mut Running,
        answer: StoreResult<WatchAnswer>,
    ) -> Result<(), End> {
        let revoked = || End::Exit(0, "lease has been revoked".to_owned());
        let (events, revision) = match answer {
            Ok(WatchAnswer::Events { events, revision }) => (events, revision),
            Ok(WatchAnswer::Progress { .. }) => return Ok(()),
            Err(StoreError::Compacted { .. }) => {
                match self.link.range(KeyRange::key(&running.key)).await {
                    Ok(answer) => {
                        running.own.begin(answer.revision);
                        let entry = answer.entries.into_iter().next().ok_or_else(revoked)?;
                        self.own_written(running, entry).await;
                    }
                    Err(_) => running.own.broke(&mut self.rng),
                }
                return Ok(());
            }
            Err(_) => {
                running.own.broke(&mut self.rng);
                return Ok(());
            }
        };
        running.own.heard(revision);
        for event in events {
            match event {
                KeyEvent::Put(entry) => self.own_written(running, entry).await,
                KeyEvent::Delete { key, .. } if parse_key(&key).is_some() => return Err(revoked()),
                KeyEvent::Delete { .. } => {}
            }
        }
        Ok(())
    }

    /// The own key was written, by whomever: its time is taken from it.
    async fn own_written(&self, running: &mut Running, entry: KeyValue) {
        if parse(&entry.key, &entry.value).is_err() {
            return;
        }
        if let Ok(left) = self.time_to_live(&entry).await {
            running.renew_at = Some(self.renewal(left));
        }
    }
}

/// The lease that it believes to hold now, and its key.
fn own(key: String, value: &str) -> Result<(String, GoLease), End> {
    let own = parse(&key, value.as_bytes());
    let own = own.map_err(|why| End::Exit(1, why))?;
    Ok((key, own))
}

/// The end of the key of these subnets.
fn wire_key(subnets: &DualStack<Subnet>) -> Option<String> {
    let half = |subnet: &Subnet| format!("{}-{}", subnet.address(), subnet.len());
    let v4 = half(&subnets.v4?);
    Some(match &subnets.v6 {
        None => v4,
        Some(v6) => format!("{v4}&{}", half(v6)),
    })
}

impl Watched {
    const fn new(range: KeyRange) -> Self {
        Self {
            range,
            watch: None,
            next: Revision(0),
            reopen_at: None,
            failures: 0,
        }
    }

    /// Goes on after a reading.
    fn begin(&mut self, read: Revision) {
        self.watch = None;
        self.heard(read);
        self.reopen_at = Some(Instant::now());
    }

    /// It goes on after the revision of the store, not after that of the last event.
    const fn heard(&mut self, revision: Revision) {
        self.next = Revision(revision.0 + 1);
        self.failures = 0;
    }

    fn broke(&mut self, rng: &mut Rng) {
        self.watch = None;
        self.failures = self.failures.saturating_add(1);
        let backoff = Backoff::new(FIRST_RECONNECT, MOST_RECONNECT);
        self.reopen_at = Some(Instant::now() + backoff.after(self.failures, rng));
    }

    async fn reopen(&mut self, link: &StoreLink, rng: &mut Rng) {
        if self.reopen_at.is_none_or(|at| at > Instant::now()) {
            return;
        }
        match link.watch(self.range.clone(), Some(self.next)).await {
            Ok(watch) => {
                self.watch = Some(watch);
                self.reopen_at = None;
            }
            Err(_) => self.broke(rng),
        }
    }

    /// What is there already.
    fn ready(&mut self) -> Option<StoreResult<WatchAnswer>> {
        self.watch.as_mut()?.try_next().transpose()
    }

    async fn next(&mut self) -> StoreResult<WatchAnswer> {
        match &mut self.watch {
            Some(watch) => watch.next().await,
            None => std::future::pending().await,
        }
    }
}
