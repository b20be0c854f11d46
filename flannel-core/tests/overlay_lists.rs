//! The whole SDK on fakes: what a status costs where thousands of records are of no use, tokio's clock
//! paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::time::Duration;

use common::*;
use flannel_core::{ConditionType, Lease, LeaseKey, MemoryManager, ObjectKey, Overlay};
use flannel_testkit::fake_kernel::FakeKernel;

/// A record outside of the network.
fn useless(n: u16) -> Lease {
    let [a, b] = n.to_be_bytes();
    let lease = peer(9, &format!("10.77.{a}.{b}/32"));
    Lease {
        key: LeaseKey::new(format!("useless-{n}")),
        ..lease
    }
}

async fn beside(records: u16) -> (MemoryManager, FakeKernel, Overlay) {
    let (manager, kernel) = (MemoryManager::new(config(DUAL)), FakeKernel::node(1));
    for n in 0..records {
        manager.put_raw(useless(n)).expect("it is written");
    }
    let overlay = start("a", &manager, &kernel).await;
    settle(&overlay).await;
    (manager, kernel, overlay)
}

#[tokio::test(start_paused = true)]
async fn a_list_is_made_anew_only_when_it_is_another() {
    for records in [30, 3_000] {
        let (manager, kernel, overlay) = beside(records).await;
        let before = overlay.status();
        assert_eq!(before.rejected.len(), usize::from(records));
        for _ in 0..3 {
            kernel.delete(&ObjectKey::Link(dev("flannel.1")));
            settle(&overlay).await;
        }
        let repaired = overlay.status();
        assert!(repaired.repairs > before.repairs);
        assert!(repaired.rejected.is_one_with(&before.rejected));
        assert!(repaired.unreadable.is_one_with(&before.unreadable));
        // Others are told of, be it a little later.
        manager.put_raw(useless(records)).expect("it is written");
        settle(&overlay).await;
        let after = overlay.status();
        assert_eq!(after.rejected.len(), usize::from(records) + 1);
        assert!(!after.rejected.is_one_with(&before.rejected));
    }
}

#[tokio::test(start_paused = true)]
async fn counts_are_of_now_and_long_lists_follow() {
    let (manager, _kernel, overlay) = beside(3_000).await;
    for n in 3_000..3_100 {
        manager.put_raw(useless(n)).expect("it is written");
        tokio::time::sleep(Duration::from_millis(6)).await;
        let status = overlay.status();
        let peers = status.condition(ConditionType::Peers).expect("one of each");
        let told = format!("{} peers are rejected", n + 1);
        assert!(peers.message.starts_with(&told), "{}", peers.message);
    }
    let in_between = overlay.status().rejected.len();
    assert!(in_between < 3_100, "each time anew: {in_between}");
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(overlay.status().rejected.len(), 3_100);
}
