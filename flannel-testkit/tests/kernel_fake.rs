//! The fake kernel keeps every promise of the trait.

use std::sync::Arc;

use flannel_testkit::conformance::kernel::{self, KernelFixture, Promise};
use flannel_testkit::fake_kernel::FakeKernel;

async fn fixture() -> Result<KernelFixture, String> {
    let kernel = FakeKernel::empty();
    KernelFixture::prepare(Arc::new(kernel.clone()), Arc::new(kernel)).await
}

fn run(promise: Promise) {
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
