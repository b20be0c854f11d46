//! The saved state in a file: what may stand in its place, beside it and in its way.
#![cfg(unix)]
#![allow(missing_docs, reason = "tests")]

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flannel_core::{FileState, FileStateError, InstanceId, SavedState, StateStore};

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Self {
        let name = format!("flannel-core-state-{test}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).expect("it is there");
        let mut names: Vec<String> = entries
            .map(|entry| {
                entry
                    .expect("read")
                    .file_name()
                    .into_string()
                    .expect("ASCII")
            })
            .collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn state(n: u64) -> SavedState {
    SavedState {
        config: Some(format!(r#"{{"Network": "10.{n}.0.0/16"}}"#)),
        instance: Some(InstanceId::from_bits(u128::from(n))),
        ..SavedState::default()
    }
}

fn mode(path: &Path) -> u32 {
    let found = fs::symlink_metadata(path).expect("it is there");
    found.permissions().mode() & 0o777
}

/// Waits for an access in real time, but not for ever.
async fn soon<T>(access: impl Future<Output = T>) -> T {
    let answer = tokio::time::timeout(Duration::from_secs(4), access).await;
    answer.expect("nothing hangs")
}

#[allow(clippy::disallowed_methods, reason = "no safe wrapper is at hand")]
fn run(program: &str, arguments: &[&str]) -> bool {
    let status = std::process::Command::new(program).args(arguments).status();
    status.is_ok_and(|status| status.success())
}

#[tokio::test]
async fn what_is_saved_comes_back_and_nobody_else_reads_it() {
    let folder = Folder::new("mode");
    let path = folder.path("state.json");
    let file = FileState::new(&path);
    assert_eq!(file.load().await.expect("no file is no error"), None);
    for n in 1..=3 {
        file.save(&state(n)).await.expect("saved");
        assert_eq!(mode(&path), 0o600);
        assert_eq!(file.load().await.expect("read"), Some(state(n)));
        assert_eq!(folder.names(), ["state.json"]);
    }
    // As an earlier version left it.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("ours");
    file.load().await.expect("read");
    assert_eq!(mode(&path), 0o600);
}

#[tokio::test]
async fn nothing_that_was_planted_is_written_to_or_removed() {
    let folder = Folder::new("planted");
    let path = folder.path("state.json");
    let victim = folder.path("victim");
    fs::write(&victim, "theirs").expect("written");
    let pid = std::process::id();
    let planted = [
        "state.json.new".to_owned(),
        format!("state.json.new.{pid}.0"),
    ];
    for name in &planted {
        symlink(&victim, folder.path(name)).expect("planted");
    }
    let dangling = format!("state.json.new.{pid}.1");
    symlink(folder.path("nowhere"), folder.path(&dangling)).expect("planted");
    let file = FileState::new(&path);
    file.save(&state(1)).await.expect("under another name");
    assert_eq!(file.load().await.expect("read"), Some(state(1)));
    assert_eq!(fs::read_to_string(&victim).expect("read"), "theirs");
    let [first, second] = planted;
    let mut names = [
        "state.json".to_owned(),
        "victim".to_owned(),
        first,
        second,
        dangling,
    ];
    names.sort();
    assert_eq!(folder.names(), names, "neither more nor less");
}

#[tokio::test]
async fn what_is_no_regular_file_is_refused_at_once_and_left() {
    let folder = Folder::new("kinds");
    let elsewhere = folder.path("elsewhere");
    let there = serde_json::to_string(&state(9)).expect("JSON");
    fs::write(&elsewhere, &there).expect("written");
    let at = |name: &str| folder.path(name);
    symlink(&elsewhere, at("link")).expect("made");
    symlink(at("nowhere"), at("dangling")).expect("made");
    fs::create_dir(at("folder")).expect("made");
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("made");
    let fifo = at("fifo");
    assert!(run("mkfifo", &[fifo.to_str().expect("ASCII")]), "a FIFO");
    let zero = at("device");
    let mut kinds = vec![
        ("link", "a symbolic link"),
        ("dangling", "a symbolic link"),
        ("folder", "a folder"),
        ("socket", "a socket"),
        ("fifo", "a FIFO"),
    ];
    // Only root makes devices.
    if run("mknod", &[zero.to_str().expect("ASCII"), "c", "1", "5"]) {
        kinds.push(("device", "a device"));
    }
    for (name, found) in kinds {
        let path = at(name);
        let before = fs::symlink_metadata(&path)
            .expect("it is there")
            .file_type();
        let file = FileState::new(&path);
        let errors = [
            soon(file.load()).await.expect_err(name),
            soon(file.keep_aside()).await.expect_err(name),
            soon(file.save(&state(1))).await.expect_err(name),
        ];
        for error in errors {
            let path = path.clone();
            let expected = FileStateError::NotAFile { path, found };
            assert_eq!(FileStateError::of(&error), Some(&expected), "{error}");
        }
        let after = fs::symlink_metadata(&path)
            .expect("it is there")
            .file_type();
        assert_eq!(before, after, "{name}");
        assert_eq!(after.is_fifo(), name == "fifo");
    }
    assert_eq!(fs::read_to_string(&elsewhere).expect("read"), there);
    let names = folder.names();
    assert!(!names.iter().any(|name| name.contains(".new")), "{names:?}");
}

#[tokio::test]
async fn a_file_of_any_size_costs_nothing_and_is_kept_whole() {
    const SIZE: u64 = 3 << 30;
    let folder = Folder::new("size");
    let path = folder.path("state.json");
    let sparse = fs::File::create(&path).expect("made");
    sparse.set_len(SIZE).expect("a hole takes no room");
    let file = FileState::new(&path);
    let error = soon(file.load()).await.expect_err("too large");
    let told = FileStateError::of(&error).expect("a typed error");
    assert!(matches!(told, FileStateError::TooLarge { .. }), "{told}");
    let kept = soon(file.keep_aside()).await.expect("kept");
    let kept = PathBuf::from(kept.expect("a place"));
    soon(file.save(&state(1))).await.expect("saved");
    assert_eq!(file.load().await.expect("read"), Some(state(1)));
    assert_eq!(fs::metadata(&kept).expect("it is there").len(), SIZE);
    assert_eq!(mode(&kept), 0o600, "it may hold a config");
}

#[tokio::test]
async fn no_more_is_kept_than_a_few_and_then_nothing_is_lost_either() {
    let folder = Folder::new("kept");
    let path = folder.path("state.json");
    let file = FileState::new(&path);
    let mut places = Vec::new();
    for n in 1..=5 {
        fs::write(&path, format!("garbage {n}")).expect("written");
        file.load().await.expect_err("garbage");
        let place = file.keep_aside().await.expect("kept").expect("a place");
        places.push((n, place));
        file.save(&state(n)).await.expect("saved");
    }
    for (n, place) in &places {
        let kept = fs::read_to_string(place).expect("it is there");
        assert_eq!(kept, format!("garbage {n}"));
    }
    let error = file.keep_aside().await.expect_err("one too many");
    let expected = FileStateError::TooManyKept { path, kept: 5 };
    assert_eq!(FileStateError::of(&error), Some(&expected));
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_the_systems_error() {
    let folder = Folder::new("gone");
    let file = FileState::new(folder.path("gone/state.json"));
    assert_eq!(file.load().await.expect("no file is no error"), None);
    let error = file.save(&state(1)).await.expect_err("no folder");
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    assert_eq!(FileStateError::of(&error), None);
}

#[test]
fn debug_output_tells_no_config() {
    let told = format!("{:?}", state(7));
    assert!(!told.contains("10.7"), "{told}");
    assert!(told.contains("instance"), "{told}");
}
