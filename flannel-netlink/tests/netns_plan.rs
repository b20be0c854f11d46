//! Plans on the real kernel: from any state to any wish in one plan, and back to nothing.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::Arc;

use common::{Net, netns_blocking};
use flannel_core::reconcile::desired::Desired;
use flannel_core::reconcile::ownership::Ownership;
use flannel_core::reconcile::plan::{plan, teardown};
use flannel_core::{Address, Family, IfName, Kernel, Link, LinkKind, Object, Observed, Op, Scope};
use flannel_netlink::NetlinkKernel;
use flannel_testkit::conformance::kernel::{KernelFixture, returns_what_was_asked};
use flannel_testkit::strategies::objects::{
    Mishap, NodeSpec, altered, differing, makeable, mishap, node_spec, ownership, public_ip,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use tokio::runtime::Runtime;

fn runner(cases: u32) -> TestRunner {
    let max_shrink_iters = 100;
    TestRunner::new(Config {
        failure_persistence: None,
        max_shrink_iters,
        ..Config::with_cases(cases)
    })
}

fn failed(text: impl Into<String>) -> TestCaseError {
    TestCaseError::fail(text.into())
}

/// Everything, with what is on every device and the settings that are wished for.
async fn observe(kernel: &dyn Kernel, desired: &Desired) -> Observed {
    let observed = kernel.observe(&Scope::default()).await.expect("a reading");
    let settings = desired
        .objects
        .keys()
        .filter(|key| matches!(key.kind(), "sysctl" | "offload"));
    let scope = Scope {
        devices: observed.objects.values().filter_map(Object::dev).collect(),
        settings: settings.cloned().collect(),
    };
    kernel.observe(&scope).await.expect("a reading")
}

/// One plan leads there: every op is accepted, and nothing is left to do.
async fn converge(
    kernel: &dyn Kernel,
    desired: &Desired,
    ownership: &Ownership,
) -> Result<(), TestCaseError> {
    let plan_now = plan(&observe(kernel, desired).await, desired, ownership);
    let ops: Vec<Op> = plan_now.steps.iter().map(|step| step.op.clone()).collect();
    for (op, result) in ops.iter().zip(kernel.apply(&ops).await) {
        result.map_err(|e| failed(format!("{} {}: {e} in {ops:#?}", op.verb(), op.object())))?;
    }
    prop_assert!(plan_now.foreign.is_empty(), "{:?}", plan_now.foreign);
    let left = plan(&observe(kernel, desired).await, desired, ownership).steps;
    prop_assert!(left.is_empty(), "left: {left:#?}");
    Ok(())
}

async fn tear_down(kernel: &dyn Kernel, ownership: &Ownership) -> Result<(), TestCaseError> {
    let observed = observe(kernel, &Desired::default()).await;
    let steps = teardown(&observed, ownership).steps;
    let ops: Vec<Op> = steps.into_iter().map(|step| step.op).collect();
    let results = kernel.apply(&ops).await.into_iter();
    results
        .collect::<Result<(), _>>()
        .map_err(|error| failed(error.to_string()))
}

/// Somebody breaks something. What the kernel refuses is not broken.
async fn befall(kernel: &dyn Kernel, desired: &Desired, mishap: &Mishap) {
    let observed = observe(kernel, desired).await;
    let keys = desired.objects.keys();
    let there: Vec<Object> = keys
        .filter_map(|key| observed.objects.get(key).cloned())
        .collect();
    if there.is_empty() {
        return;
    }
    let ops = match mishap {
        Mishap::Deleted(which) => vec![Op::Delete(which.get(&there).clone())],
        Mishap::Altered(which) => {
            let (old, new) = (which.get(&there), altered(which.get(&there)));
            if old.key() == new.key() {
                vec![Op::Change(new)]
            } else {
                vec![Op::Delete(old.clone()), Op::Change(new)]
            }
        }
        Mishap::Down(which, up_again) => {
            let links: Vec<Link> = there
                .into_iter()
                .filter_map(|object| match object {
                    Object::Link(link) => Some(link),
                    _ => None,
                })
                .collect();
            if links.is_empty() {
                return;
            }
            let set = |up| {
                Op::Change(Object::Link(Link {
                    up,
                    ..which.get(&links).clone()
                }))
            };
            if *up_again {
                vec![set(false), set(true)]
            } else {
                vec![set(false)]
            }
        }
    };
    kernel.apply(&ops).await;
}

/// An underlay as the node specs expect it.
async fn underlay(net: &Net) {
    let dev = IfName::new("eth0").expect("a name");
    let link = Link {
        name: dev,
        kind: LinkKind::Bridge,
        mtu: Some(1500),
        mac: None,
        up: true,
        alias: None,
    };
    let address = |family, prefix_len| {
        Object::Address(Address {
            dev,
            ip: public_ip(family, 1),
            prefix_len,
        })
    };
    let objects = [
        Object::Link(link),
        address(Family::V4, 24),
        address(Family::V6, 64),
    ];
    for result in net.kernel.apply(&objects.map(Op::Create)).await {
        result.expect("an underlay");
    }
}

/// What is wanted, but for packet paths, which this kernel alone does not run.
fn wish(spec: &NodeSpec) -> Desired {
    let mut desired = spec.desired();
    desired
        .objects
        .retain(|key, _| !matches!(key.kind(), "tunnel" | "tunnel-peer"));
    desired
}

async fn one_case(
    kernel: &NetlinkKernel,
    before: &NodeSpec,
    after: &NodeSpec,
    mishaps: &[Mishap],
) -> Result<(), TestCaseError> {
    let ownership = ownership(false);
    tear_down(kernel, &ownership).await?;
    let empty = observe(kernel, &Desired::default()).await.objects;
    converge(kernel, &wish(before), &ownership).await?;
    for mishap in mishaps {
        befall(kernel, &wish(before), mishap).await;
    }
    converge(kernel, &wish(after), &ownership).await?;
    tear_down(kernel, &ownership).await?;
    let left = observe(kernel, &Desired::default()).await.objects;
    prop_assert_eq!(
        differing(&empty, &left),
        std::collections::BTreeSet::default()
    );
    Ok(())
}

#[test]
fn one_plan_leads_from_any_state_to_any_wish_on_linux() {
    netns_blocking(|runtime: &Runtime, net| {
        runtime.block_on(underlay(&net));
        let worlds = (
            node_spec(),
            node_spec(),
            any::<[bool; 3]>(),
            proptest::collection::vec(mishap(), 0..4),
        );
        let result = runner(64).run(&worlds, |(before, mut after, keep, mishaps)| {
            if keep[0] {
                (after.vni, after.port) = (before.vni, before.port);
                after.named_after_vni = before.named_after_vni;
            }
            if keep[1] {
                after.peers.clone_from(&before.peers);
            }
            if keep[2] {
                (after.mac, after.nexthops) = (before.mac, before.nexthops);
            }
            runtime.block_on(one_case(&net.kernel, &before, &after, &mishaps))
        });
        result.unwrap_or_else(|error| panic!("{error}"));
    });
}

#[test]
fn whatever_can_be_made_is_read_back_as_asked() {
    netns_blocking(|runtime: &Runtime, net| {
        let foreign = NetlinkKernel::new().expect("a second kernel");
        let fixture = runtime.block_on(KernelFixture::prepare(
            Arc::new(net.kernel),
            Arc::new(foreign),
        ));
        let fixture = fixture.expect("a fixture");
        let result = runner(64).run(&makeable(fixture.underlay), |objects| {
            runtime
                .block_on(returns_what_was_asked(&fixture, &objects))
                .map_err(failed)
        });
        result.unwrap_or_else(|error| panic!("{error}"));
    });
}
