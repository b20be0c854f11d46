//! The suite that every kernel passes, on a fake kernel with packet paths around it; and what of
//! packet paths nobody but they themselves know.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::pin::Pin;
use std::sync::Arc;

use common::FakePath;
use flannel_backend_udp::WithTunnels;
use flannel_core::{Change, ChangeStream, IfName, Kernel, Object, ObjectKey, Op, Scope};
use flannel_testkit::conformance::kernel::{KernelFixture, Promise};
use flannel_testkit::fake_kernel::FakeKernel;

struct World {
    fake: FakeKernel,
    path: Arc<FakePath>,
    kernel: Arc<WithTunnels<FakeKernel>>,
}

async fn world() -> World {
    let fake = FakeKernel::empty();
    let mut features = fake.features().await.expect("features");
    features.tunnels = false;
    fake.set_features(features);
    let path = Arc::new(FakePath::new(fake.clone()));
    let kernel = WithTunnels::with_shared_path(fake.clone(), Arc::clone(&path) as _);
    let kernel = Arc::new(kernel);
    World { fake, path, kernel }
}

async fn fixture(world: &World) -> KernelFixture {
    let kernel = Arc::clone(&world.kernel) as _;
    let fixture = KernelFixture::prepare(kernel, Arc::new(world.fake.clone())).await;
    fixture.expect("a fixture")
}

fn run(promise: Promise) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let world = world().await;
        if let Err(found) = promise(&fixture(&world).await).await {
            panic!("{found}");
        }
    });
}

flannel_testkit::kernel_conformance!(run);

async fn next(changes: &mut ChangeStream) -> Change {
    let next = std::future::poll_fn(|cx| Pin::as_mut(changes).poll_next(cx)).await;
    next.expect("hints never end")
}

/// A packet path that ends is hinted at, is seen to be gone, and is made again with its peers.
#[tokio::test(start_paused = true)]
async fn a_packet_path_that_dies_is_hinted_at_and_made_again() {
    let world = world().await;
    let samples = fixture(&world).await.samples();
    let is_of_tunnel = |object: &Object| object.key().kind().starts_with("tunnel");
    let dev = samples.iter().find(|object| is_of_tunnel(object));
    let dev = dev.and_then(Object::dev).expect("the suite has tunnels");
    let objects: Vec<Object> = samples
        .into_iter()
        .filter(|object| object.dev() == Some(dev))
        .collect();
    let ops: Vec<Op> = objects.iter().cloned().map(Op::Create).collect();
    for result in world.kernel.apply(&ops).await {
        result.expect("it can be made");
    }
    let mut changes = world.kernel.changes();
    assert_eq!(next(&mut changes).await, Change::All);
    world.path.die(dev);
    assert_eq!(next(&mut changes).await, Change::Link(Some(dev)));
    let there = async || {
        let observed = world.kernel.observe(&Scope::default()).await.expect("read");
        objects
            .iter()
            .filter(|object| observed.objects.contains_key(&object.key()))
            .count()
    };
    let gone = objects.iter().filter(|object| is_of_tunnel(object)).count();
    assert_eq!(there().await, objects.len() - gone);
    for result in world.kernel.apply(&ops).await {
        result.expect("it can be made again");
    }
    assert_eq!(there().await, objects.len());
}

/// What a kernel lacks, what is around it does not bring.
#[tokio::test(start_paused = true)]
async fn packet_paths_are_there_where_tun_devices_are() {
    let world = world().await;
    for tun in [true, false] {
        let mut features = world.fake.features().await.expect("features");
        features.tun = tun;
        world.fake.set_features(features);
        let found = world.kernel.features().await.expect("features");
        assert_eq!((found.tun, found.tunnels), (tun, tun));
    }
}

/// A packet path on a device that the kernel's reading does not have is not told of either.
#[tokio::test(start_paused = true)]
async fn a_reading_has_no_packet_path_without_its_device() {
    let world = world().await;
    let samples = fixture(&world).await.samples();
    let mut tun = samples.into_iter().filter(|object| {
        matches!(object.key(), ObjectKey::Tunnel(_))
            || matches!(object, Object::Link(link) if link.kind.backend().is_some_and(|b| b.as_str() == "udp"))
    });
    let (Some(link), Some(tunnel)) = (tun.next(), tun.next()) else {
        panic!("the suite has tunnels");
    };
    let dev: IfName = link.dev().expect("it is on a device");
    world
        .kernel
        .apply(&[Op::Create(link), Op::Create(tunnel)])
        .await;
    let observed = world.kernel.observe(&Scope::default()).await.expect("read");
    assert!(observed.objects.contains_key(&ObjectKey::Tunnel(dev)));
    world.fake.delete_link(dev);
    let observed = world.kernel.observe(&Scope::default()).await.expect("read");
    assert!(!observed.objects.contains_key(&ObjectKey::Tunnel(dev)));
}
