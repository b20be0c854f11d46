//! The acts on the host around an overlay, which no object of ours says anything about, and the
//! judge of what nodes tell of them.

use std::time::Duration;

use flannel_core::{ConditionStatus, ConditionType, Family, Object};

use super::action::KernelAction;
use super::hardware::ours;
use super::judge::Invariant;
use super::settle::Unclear;
use super::world::World;

/// The time that may pass until a node tells what was done, and that it was undone: a second
/// between two looks, a second look, and twice as much.
const BOUND: Duration = Duration::from_secs(5);

/// The place of the policy rule that a stranger makes.
const RULE: u32 = 100;

/// The things that are off on a node's host.
#[derive(Debug, Default)]
pub(super) struct HostState {
    pub(super) forwarding: Option<Family>,
    pub(super) rule: Option<Family>,
}

impl World {
    pub(super) fn act_on_host(&mut self, at: usize, action: KernelAction) -> bool {
        let family = self.config.families().next().unwrap_or(Family::V4);
        let network = self.config.pools().get(family).map(|pool| pool.network());
        let node = &mut self.nodes[at];
        match action {
            KernelAction::ForwardingOff if node.host.forwarding.is_none() => {
                node.host.forwarding = Some(family);
                node.kernel.set_forwarding(family, false);
                true
            }
            KernelAction::ForwardingOn => match node.host.forwarding.take() {
                Some(family) => {
                    node.kernel.set_forwarding(family, true);
                    true
                }
                None => false,
            },
            KernelAction::RuleInFront if node.host.rule.is_none() => {
                node.host.rule = Some(family);
                if let Some(network) = network {
                    node.kernel.set_rule(RULE, network, None);
                }
                network.is_some()
            }
            KernelAction::RuleGone => match node.host.rule.take() {
                Some(family) => {
                    node.kernel.delete_rule(family, RULE);
                    true
                }
                None => false,
            },
            _ => false,
        }
    }

    /// Everything is as it should be: now each member's host is spoilt, and each says so, and says
    /// so no more once that is undone. `None`: the run is over.
    pub(super) async fn hosts_are_told_of(&mut self) -> Option<()> {
        for (spoil, mend, kind) in [
            (
                KernelAction::ForwardingOff,
                KernelAction::ForwardingOn,
                ConditionType::Forwarding,
            ),
            (
                KernelAction::RuleInFront,
                KernelAction::RuleGone,
                ConditionType::Routes,
            ),
        ] {
            let all = 0..self.nodes.len();
            let spoilt: Vec<usize> = all.filter(|at| self.is_concerned(*at, kind)).collect();
            for at in &spoilt {
                self.act_on_host(*at, spoil);
            }
            self.all_tell(&spoilt, kind, ConditionStatus::False).await?;
            for at in &spoilt {
                self.act_on_host(*at, mend);
            }
            self.all_tell(&spoilt, kind, ConditionStatus::True).await?;
        }
        Some(())
    }

    /// Tells if something is off for a node: of routes, if it has any to peers.
    fn is_concerned(&self, at: usize, kind: ConditionType) -> bool {
        let node = &self.nodes[at];
        let family = self.config.families().next();
        let has_routes = || {
            let ours = ours(&node.kernel.objects());
            // What is spared for a record that nobody can read leads to no peer.
            let unclear = Unclear::of(&self.judge.records());
            ours.iter().any(|object| {
                matches!(object, Object::Route(route) if Some(route.dst.family()) == family)
                    && !unclear.may_serve(object)
            })
        };
        // What somebody left in a peer's subnet is told all the while.
        let can_tell = || has_routes() && !self.has_narrower(at);
        node.member && node.process.is_some() && (kind != ConditionType::Routes || can_tell())
    }

    async fn all_tell(
        &mut self,
        nodes: &[usize],
        kind: ConditionType,
        expected: ConditionStatus,
    ) -> Option<()> {
        /// The interval at which the nodes are asked.
        const LOOK: Duration = Duration::from_millis(500);
        // Forwarding is off in one family, which costs the other nothing.
        let costs_all = kind != ConditionType::Forwarding || self.config.families().count() == 1;
        let may_work = expected == ConditionStatus::True || !costs_all;
        let begun = self.judge.elapsed();
        loop {
            self.pass(LOOK).await;
            if self.is_over() {
                return None;
            }
            let wrong = nodes.iter().find_map(|at| {
                let process = self.nodes[*at].process.as_ref()?;
                let status = process.overlay.status();
                let is = status.condition(kind)?.status;
                let is_right = is == expected && (may_work || !status.working);
                let what = || {
                    format!(
                        "{kind} is {is}, not {expected}; it works: {}",
                        status.working
                    )
                };
                (!is_right).then(|| (*at, what()))
            });
            let took = self.judge.elapsed().saturating_sub(begun);
            match wrong {
                None => return Some(()),
                Some((at, what)) if took > BOUND => {
                    let what = format!("after {took:?}: {what}");
                    self.judge.broken(Invariant::Tells, Some(at), what);
                    return None;
                }
                Some(_) => {}
            }
        }
    }
}
