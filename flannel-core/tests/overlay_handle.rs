//! The handle of an overlay: its clones, its log lines, its time, and the runtime that it needs.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use common::*;
use flannel_core::{ConditionType, Error, MemoryManager, Moment, OverlayName};
use flannel_testkit::fake_kernel::FakeKernel;

const MINUTE: Duration = Duration::from_secs(60);

#[tokio::test(start_paused = true)]
async fn an_overlay_runs_until_its_last_handle_is_dropped() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let first = start("a", &manager, &kernel).await;
    let second = first.clone();
    let mut status = first.watch_status();
    drop(first);
    tokio::time::sleep(MINUTE).await;
    second
        .resync()
        .await
        .expect("it runs for the one that is left");
    drop(second);
    let ended = async { while status.changed().await.is_ok() {} };
    tokio::time::timeout(MINUTE, ended).await.expect("it ends");
    assert!(status.borrow().stopped.is_some());
}

#[tokio::test(start_paused = true)]
async fn an_overlay_that_one_handle_stops_has_stopped_for_all() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let first = start("a", &manager, &kernel).await;
    let second = first.clone();
    let waiting = tokio::spawn(async move { second.stopped().await });
    first.stop().await.expect("running");
    assert!(first.status().stopped.is_some(), "its task has ended");
    let why = tokio::time::timeout(MINUTE, waiting).await.expect("told");
    let why = why.expect("no panic").to_string();
    assert_eq!(why, "the overlay has stopped: it was asked to");
    for again in [
        first.stop().await,
        first.teardown().await,
        first.resync().await,
    ] {
        let error = again.expect_err("it has stopped");
        assert!(matches!(error, Error::Stopped { .. }), "{error}");
    }
    // The name is free for another one at once.
    let _third = start("a", &manager, &kernel).await;
}

#[tokio::test(start_paused = true)]
async fn a_moment_of_the_overlay_is_a_time_of_day() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let overlay = start("a", &manager, &kernel).await;
    let status = overlay.status();
    let condition = status.condition(ConditionType::Kernel).expect("there");
    tokio::time::sleep(MINUTE * 3).await;
    let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let since = condition.since.wall_time(overlay.now(), wall);
    let ago = wall.duration_since(since.expect("a time")).expect("before");
    assert!(ago >= MINUTE * 3 && ago < MINUTE * 4, "{ago:?}");
}

#[test]
fn the_wall_time_of_a_moment_is_exact_and_total() {
    let at = |secs| Moment::from_duration(Duration::from_secs(secs));
    let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
    for (moment, secs) in [(100, 1000), (40, 940), (160, 1060), (0, 900)] {
        let expected = SystemTime::UNIX_EPOCH + Duration::from_secs(secs);
        assert_eq!(at(moment).wall_time(at(100), wall), Some(expected));
    }
    assert_eq!(
        at(u64::MAX).wall_time(at(0), wall),
        None,
        "no system has that time"
    );
}

#[test]
fn a_runtime_without_timers_or_none_at_all_is_an_error() {
    let manager = MemoryManager::new(config(DUAL));
    let kernel = FakeKernel::node(1);
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.build().expect("a runtime");
    let start = || builder("a", &manager, &kernel).start();
    let error = runtime.block_on(start()).expect_err("it has no timers");
    assert!(matches!(error, Error::Runtime { .. }), "{error}");
    assert!(error.to_string().contains("enable_time"), "{error}");
    let preflight = async { builder("a", &manager, &kernel).preflight().await };
    let error = runtime.block_on(preflight).expect_err("it has no timers");
    assert!(matches!(error, Error::Runtime { .. }), "{error}");
    // Without any runtime.
    let mut start = std::pin::pin!(start());
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    let std::task::Poll::Ready(answer) = start.as_mut().poll(&mut cx) else {
        panic!("there is nothing to wait for");
    };
    let error = answer.expect_err("there is no runtime");
    assert!(matches!(error, Error::Runtime { .. }), "{error}");
}

/// Lines of a log.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic inside").extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn each_log_line_of_an_overlay_names_it_and_its_node() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let manager = MemoryManager::new(config(DUAL));
    for (name, number) in [("red", 1), ("blue", 2)] {
        let kernel = FakeKernel::node(number);
        let overlay = builder(&format!("node-{number}"), &manager, &kernel)
            .name(OverlayName::new(name).expect("a name"))
            .start()
            .await
            .expect("all parts");
        overlay.ready().await.expect("ready");
        let text = std::mem::take(&mut *lines.0.lock().expect("no panic inside"));
        let text = String::from_utf8(text).expect("text");
        let of_it = format!("overlay{{name={name} node=node-{number}}}");
        assert!(
            text.lines().count() >= ConditionType::ALL.len() / 2,
            "{text}"
        );
        for line in text.lines() {
            assert!(line.contains(&of_it), "{line}");
        }
    }
}
