//! The fake kernel keeps every promise of the trait.

use std::sync::Arc;

use flannel_testkit::conformance::kernel::{self, KernelFixture, Outcome, Promise};
use flannel_testkit::fake_kernel::FakeKernel;

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
