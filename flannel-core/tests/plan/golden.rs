//! Golden triples: what is there, what is wanted, and the plan between them, as JSON. The files
//! show what a plan looks like to a reader and to programs, and pin the serialised form.

use std::fs;
use std::path::{Path, PathBuf};

use flannel_core::reconcile::desired::{Desired, Wanted};
use flannel_core::reconcile::plan::{Plan, plan};
use flannel_testkit::strategies::objects::ownership;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What is wanted, with what the plan is told of ownership beside the test kit's networks.
#[derive(Serialize, Deserialize)]
struct Case {
    /// What the case shows.
    about: String,
    adopt_flannel: bool,
    hold_orphans: bool,
    objects: Vec<Wanted>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plan")
}

fn read<T: DeserializeOwned>(path: &Path) -> T {
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn each_golden_state_and_wish_give_the_golden_plan() {
    let mut cases: Vec<_> = fs::read_dir(folder())
        .expect("the golden cases are there")
        .map(|entry| entry.expect("the folder can be listed").path())
        .filter(|path| path.is_dir())
        .collect();
    cases.sort();
    assert!(cases.len() >= 8, "only {} golden cases", cases.len());
    for case in cases {
        let observed = read(&case.join("observed.json"));
        let wish: Case = read(&case.join("desired.json"));
        let desired = Desired {
            objects: wish
                .objects
                .into_iter()
                .map(|wanted| (wanted.object.key(), wanted))
                .collect(),
            hold_orphans: wish.hold_orphans,
            ..Desired::default()
        };
        let made = plan(&observed, &desired, &ownership(wish.adopt_flannel));
        let golden: Plan = read(&case.join("plan.json"));
        assert_eq!(
            made,
            golden,
            "{} ({}); the plan is now: {}",
            case.display(),
            wish.about,
            serde_json::to_string_pretty(&made).expect("a plan can be written"),
        );
        let golden: serde_json::Value = read(&case.join("plan.json"));
        let written = serde_json::to_value(&made).expect("a plan can be written");
        assert_eq!(written, golden, "{}", case.display());
    }
}
