//! The fake kernel's own tools: faults, hints, the log.

use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use flannel_core::kernel::Error;
use flannel_core::{Address, Change, ChangeStream, IfName, Kernel, Object, ObjectKey, Op, Scope};
use flannel_testkit::fake_kernel::{Failure, FakeKernel, FaultKind};

fn now<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    match future
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(result) => result,
        Poll::Pending => unreachable!("a fake kernel without latency answers at once"),
    }
}

fn eth0() -> IfName {
    IfName::new("eth0").expect("a device name")
}

fn address(n: u8) -> Object {
    Object::Address(Address {
        dev: eth0(),
        ip: [10, 0, 0, n].into(),
        prefix_len: 32,
    })
}

fn creates(numbers: std::ops::Range<u8>) -> Vec<Op> {
    numbers.map(|n| Op::Create(address(n))).collect()
}

fn hints(stream: &mut ChangeStream) -> Vec<Change> {
    let mut cx = Context::from_waker(Waker::noop());
    let mut hints = Vec::new();
    while let Poll::Ready(Some(hint)) = stream.as_mut().poll_next(&mut cx) {
        hints.push(hint);
    }
    hints
}

#[test]
fn a_batch_that_times_out_is_made_in_part() {
    let kernel = FakeKernel::new();
    kernel.fail_next(FaultKind::ApplyTimesOut { after: 1 });
    let results = now(kernel.apply(&creates(1..5)));
    let answered: Vec<_> = results.iter().map(Result::is_ok).collect();
    assert_eq!(answered, [true, false, false, false]);
    let made: Vec<_> = (1..5)
        .map(|n| kernel.get(&address(n).key()).is_some())
        .collect();
    assert_eq!(made, [true, true, false, false]);
    kernel.assert_faults_consumed();
    assert!(now(kernel.apply(&creates(1..5))).iter().all(Result::is_ok));
}

#[test]
fn a_device_deleted_in_a_batch_fails_what_comes_after() {
    let kernel = FakeKernel::new();
    kernel.fail_next(FaultKind::DeviceDeleted {
        dev: eth0(),
        after: 2,
    });
    let results = now(kernel.apply(&creates(1..4)));
    assert!(matches!(
        results.as_slice(),
        [Ok(()), Ok(()), Err(Error::NoSuchDevice { .. })]
    ));
    assert_eq!(kernel.get(&address(1).key()), None);
}

#[test]
fn a_fault_comes_once_and_a_refusal_until_it_is_ended() {
    let kernel = FakeKernel::new();
    kernel.fail_next(FaultKind::Op {
        kind: "address",
        failure: Failure::Busy,
    });
    kernel.refuse(address(3).key(), Failure::Rejected);
    for expected in [[false, true, false], [true, true, false]] {
        let results = now(kernel.apply(&creates(1..4)));
        let made: Vec<_> = results.iter().map(Result::is_ok).collect();
        assert_eq!(made, expected);
    }
    kernel.accept(&address(3).key());
    assert!(now(kernel.apply(&creates(1..4))).iter().all(Result::is_ok));
    assert_eq!(kernel.take_log().len(), 9);
    assert!(kernel.log().is_empty());
}

#[test]
fn an_ignored_op_is_answered_as_made_and_changes_nothing() {
    let kernel = FakeKernel::new();
    let before = kernel.objects();
    kernel.fail_next(FaultKind::Ignored { kind: "address" });
    let results = now(kernel.apply(&creates(10..12)));
    assert!(results.iter().all(Result::is_ok));
    kernel.assert_faults_consumed();
    assert_eq!(kernel.get(&address(10).key()), None);
    assert_eq!(kernel.get(&address(11).key()), Some(address(11)));
    assert_eq!(kernel.objects().len(), before.len() + 1);
}

#[test]
fn an_interrupted_reading_is_an_error_and_the_next_is_whole() {
    let kernel = FakeKernel::new();
    kernel.fail_next(FaultKind::Observe {
        failure: Failure::Interrupted,
    });
    let scope = Scope::default();
    assert!(matches!(
        now(kernel.observe(&scope)),
        Err(Error::Interrupted)
    ));
    let observed = now(kernel.observe(&scope)).expect("the fault is over");
    assert_eq!(observed.links.len(), 2);
    assert!(observed.objects.contains_key(&ObjectKey::Link(eth0())));
    assert_eq!(kernel.observations(), 2);
}

#[test]
#[should_panic(expected = "Overrun")]
fn a_fault_that_never_came_is_told() {
    let kernel = FakeKernel::new();
    kernel.fail_next(FaultKind::Overrun);
    kernel.assert_faults_consumed();
}

#[test]
fn lost_hints_are_all_or_nothing() {
    let kernel = FakeKernel::new();
    let mut stream = kernel.changes();
    assert_eq!(hints(&mut stream), [Change::All]);
    let add = |n| {
        kernel
            .external(&Op::Create(address(n)))
            .expect("it can be made")
    };
    add(1);
    assert_eq!(hints(&mut stream), [Change::Set(address(1))]);
    kernel.fail_next(FaultKind::Overrun);
    add(2);
    assert_eq!(hints(&mut stream), [Change::All]);
    kernel.fail_next(FaultKind::HintsLost);
    add(3);
    assert_eq!(hints(&mut stream), []);
    kernel.assert_faults_consumed();
}

#[tokio::test]
async fn every_call_takes_the_latency() {
    let kernel = FakeKernel::new();
    let latency = Duration::from_millis(5);
    kernel.set_latency(latency);
    let start = tokio::time::Instant::now();
    kernel.apply(&creates(1..2)).await;
    assert!(start.elapsed() >= latency);
}
