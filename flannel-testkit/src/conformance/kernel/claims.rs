//! Claims: one overlay of a name in a namespace at a time.

use std::time::Duration;

use flannel_core::OverlayName;
use flannel_core::kernel::Error;
use tokio::time::timeout;

use super::Outcome;
use super::fixture::{KernelFixture, text};

/// More than any answer takes.
const LIMIT: Duration = Duration::from_secs(5);

fn overlay(name: &str) -> Result<OverlayName, String> {
    OverlayName::new(name).map_err(text)
}

/// An overlay is claimed by one at a time; overlays of other names are another matter; what is dropped
/// is free at once.
pub async fn an_overlay_is_claimed_by_one_at_a_time(fixture: &KernelFixture) -> Outcome {
    let (one, other) = (overlay("one")?, overlay("other")?);
    for _ in 0..3 {
        let claim = fixture.kernel.claim(&one, false).await.map_err(text)?;
        for kernel in [&fixture.kernel, &fixture.foreign] {
            match kernel.claim(&one, false).await {
                Err(Error::Held { .. }) => {}
                result => return Err(format!("a second claim: {result:?}")),
            }
        }
        drop(fixture.foreign.claim(&other, false).await.map_err(text)?);
        drop(claim);
        drop(fixture.foreign.claim(&one, false).await.map_err(text)?);
    }
    Ok(())
}

/// A holder of an overlay is told that another asks for it; the other has it when it is dropped.
pub async fn a_claim_is_handed_over_on_request(fixture: &KernelFixture) -> Outcome {
    let name = overlay("handed")?;
    let mut claim = fixture.kernel.claim(&name, false).await.map_err(text)?;
    let asks = fixture.foreign.claim(&name, true);
    let hands_over = async {
        let asked = timeout(LIMIT, claim.asked()).await;
        let asked = asked.map_err(|_| "nobody was heard to ask".to_owned());
        drop(claim);
        asked
    };
    let (had, asked) = tokio::join!(timeout(LIMIT, asks), hands_over);
    asked?;
    let had = had.map_err(|_| "it was not had in time".to_owned())?;
    let had = had.map_err(text)?;
    match fixture.kernel.claim(&name, false).await {
        Err(Error::Held { .. }) => {}
        result => return Err(format!("a claim after the handover: {result:?}")),
    }
    drop(had);
    Ok(())
}
