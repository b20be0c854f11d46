//! Nodes that come back under another node id.

use std::sync::Arc;

use flannel_core::NodeId;

use super::action::{KernelAction, Renaming};
use super::node::Disk;
use super::world::World;

impl World {
    /// Ends a node's program, gives the node an id that nobody had, and starts it.
    pub(super) async fn rename(&mut self, at: usize, renaming: Renaming) -> bool {
        if !self.nodes[at].member {
            return false;
        }
        self.kill(at).await;
        let node = &mut self.nodes[at];
        node.renamings += 1;
        let id = format!("node-{at}-{}", node.renamings);
        node.id = NodeId::new(id).expect("a node id");
        self.judge.renamed(at, node.id.clone());
        self.judge.doubt_all(at);
        // Others may have what it had, and it may not know.
        self.misled.insert(at);
        match renaming {
            Renaming::Kept => {}
            Renaming::Forgotten => {
                let node = &mut self.nodes[at];
                node.disk = Arc::new(Disk::default());
                node.forgetful = true;
            }
            Renaming::Moved => {
                let next = self.nodes[at].address + 1;
                self.act_on_kernel(at, KernelAction::UnderlayAddress(next));
            }
        }
        self.start(at).await
    }
}
