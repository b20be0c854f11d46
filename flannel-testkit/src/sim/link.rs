//! Between a node and its store: a manager that loses, delays and repeats, within what a
//! [`Manager`] promises.

use std::collections::BTreeMap;
use std::future::pending;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::manager::{Error, Result};
use flannel_core::{
    Capabilities, EventStream, Lease, LeaseRequest, Manager, NetworkConfig, NodeId,
};
use tokio::time::{Instant, sleep};

use super::action::{Delivery, LinkAction};
use super::io::Io;
use super::judge::Judge;
use super::watch::Watch;

/// What a node's link to the store does to calls and deliveries. Outlives the node's processes.
#[derive(Debug, Default)]
pub(super) struct Link {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Nothing passes; whether calls wait.
    cut: Option<bool>,
    frozen: bool,
    delay: Duration,
    lose_requests: u32,
    lose_answers: u32,
    hold: Option<Hold>,
    interruptions: u64,
    last: Interruption,
    /// Deliveries that have not arrived.
    under_way: BTreeMap<u64, usize>,
    watches: u64,
    wakers: Vec<Waker>,
    /// Faults that took effect, by their kind.
    effects: BTreeMap<String, u64>,
}

/// Deliveries are held.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hold {
    pub(super) until: Instant,
    pub(super) delivery: Delivery,
}

/// What interrupts a watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Interruption {
    /// It reports an error and starts again.
    #[default]
    Break,
    /// It ends.
    End,
    /// It starts again without a word.
    Resnapshot,
}

/// How a link is, as a watch sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weather {
    pub(super) cut: bool,
    pub(super) frozen: bool,
    pub(super) delay: Duration,
    pub(super) hold: Option<Hold>,
    /// How many interruptions there were, and what the last was.
    pub(super) interruptions: (u64, Interruption),
}

impl Link {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let wakers = {
            let mut state = self.state();
            change(&mut state);
            std::mem::take(&mut state.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Does what an action says.
    pub(super) fn act(&self, action: LinkAction) {
        self.change(|state| match action {
            LinkAction::Cut { silent } => state.cut = Some(silent),
            LinkAction::Heal => state.cut = None,
            LinkAction::Delay(delay) => state.delay = delay,
            LinkAction::LoseRequest => state.lose_requests += 1,
            LinkAction::LoseAnswer => state.lose_answers += 1,
            LinkAction::Hold(time, delivery) => {
                state.hold = Some(Hold {
                    until: Instant::now() + time,
                    delivery,
                });
            }
            LinkAction::Break => state.interrupt(Interruption::Break),
            LinkAction::End => state.interrupt(Interruption::End),
            LinkAction::Resnapshot => state.interrupt(Interruption::Resnapshot),
            LinkAction::Wire(_) => {}
        });
    }

    /// Everything is as it should be from now on.
    pub(super) fn repair(&self) {
        self.change(|state| {
            state.cut = None;
            state.delay = Duration::ZERO;
            state.lose_requests = 0;
            state.lose_answers = 0;
            state.hold = None;
        });
    }

    /// Deliveries wait while the node sleeps.
    pub(super) fn freeze(&self, frozen: bool) {
        self.change(|state| state.frozen = frozen);
    }

    /// Whether nothing is wrong and nothing is under way.
    pub(super) fn is_quiet(&self) -> bool {
        let state = self.state();
        state.cut.is_none()
            && state.delay.is_zero()
            && state.hold.is_none()
            && state.under_way.values().all(|pending| *pending == 0)
    }

    /// Notes that a fault took effect.
    pub(super) fn felt(&self, kind: &LinkAction) {
        let kind = super::action::Action::Link(0, *kind).kind();
        *self.state().effects.entry(kind).or_default() += 1;
    }

    pub(super) fn take_effects(&self) -> BTreeMap<String, u64> {
        std::mem::take(&mut self.state().effects)
    }

    /// How the link is; the task is woken when that changes.
    pub(super) fn weather(&self, cx: &Context<'_>) -> Weather {
        let mut state = self.state();
        if !state.wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            state.wakers.push(cx.waker().clone());
        }
        Weather {
            cut: state.cut.is_some(),
            frozen: state.frozen,
            delay: state.delay,
            hold: state.hold,
            interruptions: (state.interruptions, state.last),
        }
    }

    /// What was held has been given out.
    pub(super) fn release(&self) {
        self.state().hold = None;
    }

    /// A number for a new watch, and how many interruptions it need not mind.
    pub(super) fn open(&self) -> (u64, u64) {
        let mut state = self.state();
        state.watches += 1;
        (state.watches, state.interruptions)
    }

    /// How many deliveries of a watch are under way.
    pub(super) fn note_under_way(&self, watch: u64, pending: Option<usize>) {
        let mut state = self.state();
        match pending {
            Some(pending) => state.under_way.insert(watch, pending),
            None => state.under_way.remove(&watch),
        };
    }

    /// What becomes of a call; `None`: it passes.
    fn fate(&self) -> Option<Fate> {
        let mut state = self.state();
        if let Some(silent) = state.cut {
            return Some(Fate::Cut { silent });
        }
        if state.lose_requests > 0 {
            state.lose_requests -= 1;
            return Some(Fate::LostRequest);
        }
        None
    }

    fn loses_answer(&self) -> bool {
        let mut state = self.state();
        let loses = state.lose_answers > 0 || state.cut.is_some();
        state.lose_answers = state.lose_answers.saturating_sub(1);
        loses
    }
}

impl State {
    const fn interrupt(&mut self, how: Interruption) {
        self.interruptions += 1;
        self.last = how;
    }
}

enum Fate {
    Cut { silent: bool },
    LostRequest,
}

/// A node's manager: the store's, behind the node's link and its process's border.
#[derive(Debug)]
pub(super) struct Faulty {
    pub(super) node: NodeId,
    pub(super) inner: Arc<dyn Manager>,
    pub(super) link: Arc<Link>,
    pub(super) io: Arc<Io>,
    pub(super) judge: Arc<Judge>,
}

impl Faulty {
    async fn call<T>(
        &self,
        what: &'static str,
        call: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        self.io.before().await;
        match self.link.fate() {
            Some(Fate::Cut { silent: true }) => {
                self.link.felt(&LinkAction::Cut { silent: true });
                return pending().await;
            }
            Some(Fate::Cut { silent: false }) => {
                self.link.felt(&LinkAction::Cut { silent: false });
                return Err(Error::unavailable("connection refused"));
            }
            Some(Fate::LostRequest) => {
                self.link.felt(&LinkAction::LoseRequest);
                return Err(Error::unavailable("the request was lost"));
            }
            None => {}
        }
        let delay = self.link.state().delay;
        if !delay.is_zero() {
            self.link.felt(&LinkAction::Delay(delay));
            sleep(delay).await;
        }
        self.judge.catch_up();
        let answer = call.await;
        self.judge.called(&self.node, what, answer.as_ref().err());
        self.io.after().await;
        if self.link.loses_answer() {
            self.link.felt(&LinkAction::LoseAnswer);
            return Err(Error::unavailable("the answer was lost"));
        }
        answer
    }
}

#[async_trait]
impl Manager for Faulty {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    async fn network_config(&self) -> Result<NetworkConfig> {
        self.call("config", self.inner.network_config()).await
    }

    async fn acquire_lease(&self, request: &LeaseRequest) -> Result<Lease> {
        self.call("acquire", self.inner.acquire_lease(request))
            .await
    }

    async fn renew_lease(&self, lease: &Lease) -> Result<Lease> {
        self.call("renew", self.inner.renew_lease(lease)).await
    }

    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        self.call("release", self.inner.release_lease(lease)).await
    }

    fn watch_leases(&self) -> EventStream {
        Box::pin(Watch::new(Arc::clone(&self.inner), Arc::clone(&self.link)))
    }
}
