//! [`Splitter`]: takes JSON apart while it arrives, so that a list of thousands of Nodes is never in
//! memory as a whole.

/// The longest object, in bytes. etcd takes 1.5 MB unless told otherwise.
const LONGEST: usize = 16 << 20;

/// The most of a list that is not part of its items.
const LONGEST_REST: usize = 1 << 20;

/// Why what arrives cannot be taken apart.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SplitError {
    /// One object is longer than 16 MiB, or the rest of a list longer than 1 MiB.
    #[error("an object is longer than {limit} bytes")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// A bracket is closed that was not opened.
    #[error("the brackets do not match")]
    Brackets,
}

/// Where objects begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// One after the other, as in the answer to a watch.
    Stream,
    /// In the array `items` of one object, as in the answer to a list.
    List,
}

/// Takes apart what arrives in pieces of any size: a stream of objects, or the items of a list.
///
/// It looks at brackets and strings only; whether an object is JSON is for its reader to find out.
#[derive(Debug, Clone)]
pub struct Splitter {
    kind: Kind,
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// The object under way, and the depth at which it ends.
    object: Option<(Vec<u8>, usize)>,
    /// Of a list, what is outside of the items.
    rest: Vec<u8>,
    /// The last text at the depth of a list's members: the name of the member that follows.
    name: Vec<u8>,
    in_items: bool,
}

impl Splitter {
    const fn new(kind: Kind) -> Self {
        Self {
            kind,
            depth: 0,
            in_string: false,
            escaped: false,
            object: None,
            rest: Vec::new(),
            name: Vec::new(),
            in_items: false,
        }
    }

    /// For objects that follow one another.
    pub const fn stream() -> Self {
        Self::new(Kind::Stream)
    }

    /// For the items of a list.
    pub const fn list() -> Self {
        Self::new(Kind::List)
    }

    /// Takes the next bytes, and calls `found` with each object that ends in them.
    ///
    /// # Errors
    /// [`SplitError`]; what follows cannot be made sense of.
    pub fn feed(&mut self, bytes: &[u8], mut found: impl FnMut(Vec<u8>)) -> Result<(), SplitError> {
        for byte in bytes {
            if let Some(object) = self.take(*byte)? {
                found(object);
            }
        }
        Ok(())
    }

    /// Whether nothing is under way: what arrived ended where an object ends.
    pub const fn is_complete(&self) -> bool {
        self.depth == 0 && !self.in_string && self.object.is_none()
    }

    /// Of a list, everything but its items: an object whose `items` are empty.
    pub fn rest(&self) -> &[u8] {
        &self.rest
    }

    fn take(&mut self, byte: u8) -> Result<Option<Vec<u8>>, SplitError> {
        let was_string = self.in_string;
        let depth = self.depth;
        if self.in_string {
            self.in_string = self.escaped || byte != b'"';
            self.escaped = !self.escaped && byte == b'\\';
        } else {
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.checked_sub(1).ok_or(SplitError::Brackets)?;
                }
                _ => {}
            }
        }
        if let Some((object, end)) = &mut self.object {
            if object.len() >= LONGEST {
                return Err(SplitError::TooLong { limit: LONGEST });
            }
            object.push(byte);
            // Within a string the depth is that of what the string is in.
            return Ok(if self.depth == *end {
                self.object.take().map(|(object, _)| object)
            } else {
                None
            });
        }
        let opens = !was_string && byte == b'{';
        let begins = match self.kind {
            Kind::Stream => depth == 0,
            Kind::List => self.in_items && depth == 2,
        };
        if opens && begins {
            self.object = Some((vec![byte], depth));
            return Ok(None);
        }
        if self.kind == Kind::List {
            self.outside(byte, was_string, depth)?;
        }
        Ok(None)
    }

    /// A byte of a list that is in none of its items.
    fn outside(&mut self, byte: u8, was_string: bool, depth: usize) -> Result<(), SplitError> {
        if self.in_items {
            if !was_string && byte == b']' && depth == 2 {
                self.in_items = false;
            } else {
                return Ok(());
            }
        } else if depth == 1 {
            match (was_string, byte) {
                (false, b'"') => self.name.clear(),
                (true, byte) if self.in_string => self.name.push(byte),
                (false, b'[') if self.name == b"items" => self.in_items = true,
                _ => {}
            }
        }
        if self.rest.len() >= LONGEST_REST {
            return Err(SplitError::TooLong {
                limit: LONGEST_REST,
            });
        }
        self.rest.push(byte);
        Ok(())
    }
}
