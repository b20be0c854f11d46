//! The condition of the packet path in user space: of the task that a network may run, and of what the
//! kernel's side of it tells.

use super::Engine;
use crate::condition::ConditionType;
use crate::object::ObjectKey;

impl Engine {
    /// Draws the condition. While the task of the network has ended it says why that did.
    pub(super) fn conclude_data_path(&mut self) {
        if self.data_path.is_none() {
            return;
        }
        let mut faults = self.parts.kernel.path_faults();
        let desired = &self.compiler.desired().objects;
        faults.retain(|fault| desired.contains_key(&ObjectKey::Tunnel(fault.dev)));
        match faults.first() {
            None => self.holds(ConditionType::DataPath, "Running", ""),
            Some(fault) => {
                let message = format!(
                    "the packet path on {} carries nothing until it runs again: {}",
                    fault.dev, fault.problem
                );
                self.fails(ConditionType::DataPath, "Broken", message, false);
            }
        }
    }
}
