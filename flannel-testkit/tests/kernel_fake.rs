//! The fake kernel keeps every promise of the trait.

use std::sync::Arc;

use flannel_core::Family;
use flannel_testkit::conformance::kernel::{self, KernelFixture, Outcome, Promise};
use flannel_testkit::fake_kernel::{FakeKernel, FaultKind};

async fn fixture() -> Result<KernelFixture, String> {
    let kernel = FakeKernel::empty();
    KernelFixture::prepare(Arc::new(kernel.clone()), Arc::new(kernel)).await
}

fn run(promise: Promise) {
    run_on_fixture(async |fixture| promise(fixture).await);
}

fn run_on_fixture(promise: impl AsyncFnOnce(&KernelFixture) -> Outcome) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime can be made");
    let outcome = runtime.block_on(async {
        let fixture = fixture().await?;
        promise(&fixture).await
    });
    outcome.unwrap_or_else(|reason| panic!("{reason}"));
}

flannel_testkit::kernel_conformance!(run);

/// As a socket's buffer that is too small does it.
#[tokio::test]
async fn lost_hints_are_told() {
    let fake = FakeKernel::empty();
    let fixture = KernelFixture::prepare(Arc::new(fake.clone()), Arc::new(fake.clone())).await;
    let fixture = fixture.expect("a fixture");
    let outcome =
        kernel::lost_hints_are_told(&fixture, || fake.fail_next(FaultKind::Overrun)).await;
    outcome.unwrap_or_else(|reason| panic!("{reason}"));
    fake.assert_faults_consumed();
}

/// As another program does it in the middle of a call: the same law, with the fault that stands
/// for it.
#[tokio::test]
async fn a_device_deleted_meanwhile_is_missing_from_then_on() {
    let fake = FakeKernel::empty();
    let fixture = KernelFixture::prepare(Arc::new(fake.clone()), Arc::new(fake.clone())).await;
    let fixture = fixture.expect("a fixture");
    let untouched = kernel::a_device_deleted_by_others_meanwhile(&fixture).await;
    assert_eq!(untouched, Ok(false), "the fake takes a call as a whole");
    fake.fail_next(FaultKind::DeviceDeleted {
        dev: KernelFixture::overlay(Family::V4),
        after: 700,
    });
    let met = kernel::a_device_deleted_by_others_meanwhile(&fixture).await;
    assert_eq!(met, Ok(true));
    fake.assert_faults_consumed();
}

#[tokio::test]
async fn the_whole_suite_has_one_outcome_per_promise() {
    let outcomes = kernel::all(fixture).await;
    assert_eq!(outcomes.len(), kernel::PROMISES.len());
    for (name, outcome) in outcomes {
        outcome.unwrap_or_else(|reason| panic!("{name}: {reason}"));
    }
}

#[cfg(feature = "proptest")]
proptest::proptest! {
    #[test]
    fn objects_of_any_values_are_returned_as_asked(
        objects in flannel_testkit::strategies::objects::makeable(kernel::underlay()),
    ) {
        run_on_fixture(async |fixture| kernel::returns_what_was_asked(fixture, &objects).await);
    }
}
