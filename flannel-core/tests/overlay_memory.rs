//! The whole SDK on fakes, with a saved state that cannot be read: tokio's clock paused.
#![allow(missing_docs, reason = "tests")]

#[path = "overlay/common.rs"]
mod common;

use std::path::PathBuf;
use std::time::Duration;

use common::*;
use flannel_core::{FileState, MemoryManager, Note, SavedState};
use flannel_testkit::fake_kernel::FakeKernel;

const MINUTE: Duration = Duration::from_secs(60);

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        let name = format!("flannel-core-memory-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    fn read(&self, name: &str) -> Option<String> {
        std::fs::read_to_string(self.0.join(name)).ok()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

#[tokio::test(start_paused = true)]
async fn a_saved_state_that_cannot_be_read_is_kept_and_told_of() {
    let folder = Folder::new();
    let path = folder.0.join("state.json");
    let said = |notes: &[Note]| {
        let mut notes = notes.iter().filter(|note| note.topic == "saved-state");
        notes.next().map(|note| note.text.clone())
    };
    for (at, name) in [(1, "state.json.unreadable"), (2, "state.json.unreadable.2")] {
        let garbage = format!("{{\"lease\": torn for the {at}. time");
        std::fs::write(&path, &garbage).expect("written");
        let (manager, kernel) = (MemoryManager::new(config(DUAL)), FakeKernel::node(1));
        let node = || builder("a", &manager, &kernel).state(FileState::new(&path));
        let overlay = node().start().await.expect("all parts");
        ready_within(MINUTE, &overlay).await;
        let text = said(&overlay.status().notes).expect("it is told");
        assert!(text.contains(name), "{text}");
        assert_eq!(folder.read(name), Some(garbage));
        overlay.stop().await.expect("running");
        let saved = folder.read("state.json").expect("a new one");
        let saved: SavedState = serde_json::from_str(&saved).expect("it can be read");
        assert!(saved.instance.is_some());
        // With what was written there is nothing to tell.
        let overlay = node().start().await.expect("all parts");
        ready_within(MINUTE, &overlay).await;
        assert_eq!(said(&overlay.status().notes), None);
    }
}
