//! The Merkle tree over a log's leaves, its proofs, and how they are checked.
//!
//! RFC 6962 section 2.1 defines the tree hash MTH over leaves D[0..n] by the largest power of two k < n:
//!
//! ```text
//! MTH({})     = SHA-256()
//! MTH({d})    = SHA-256(0x00 || d)
//! MTH(D[0:n]) = SHA-256(0x01 || MTH(D[0:k]) || MTH(D[k:n]))
//! ```
//!
//! Sections 2.1.1 and 2.1.2 define the proofs; the iterative checks are those of RFC 9162 sections 2.1.3.2 and
//! 2.1.4.2. A proof of inclusion shows that a record stands at an index of a tree with a known root; a proof of
//! consistency shows that a tree with a known root is the beginning of another one.

use crate::chain::Hash;

/// Most hashes in a proof: one for each level of a tree with 2^63 leaves.
pub const MAX_PROOF: usize = 63;

/// A tree that can grow and has a root, as the roots of its full subtrees: what a reader of a log needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    size: u64,
    /// Roots of full subtrees, largest first; their sizes are the bits of `size`.
    peaks: Vec<Hash>,
}

impl Tree {
    /// Appends a leaf.
    pub fn push(&mut self, leaf: Hash) {
        let mut node = leaf;
        let mut size = self.size;
        while size & 1 == 1 {
            if let Some(left) = self.peaks.pop() {
                node = Hash::node(left, node);
            }
            size >>= 1;
        }
        self.peaks.push(node);
        self.size += 1;
    }

    /// Number of leaves.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The tree hash; that of the empty tree is SHA-256 of nothing.
    pub fn root(&self) -> Hash {
        let mut peaks = self.peaks.iter().rev().copied();
        let Some(last) = peaks.next() else {
            return Hash::of(&[]);
        };
        peaks.fold(last, |right, left| Hash::node(left, right))
    }
}

/// A tree with all its nodes, 64 bytes a leaf: what proofs are made from.
#[derive(Debug, Clone, Default)]
pub struct Nodes {
    /// Hashes of the full subtrees of 2^level leaves, in order.
    levels: Vec<Vec<Hash>>,
}

impl Nodes {
    /// Appends a leaf.
    pub fn push(&mut self, leaf: Hash) {
        let mut node = leaf;
        for level in 0.. {
            if self.levels.len() == level {
                self.levels.push(Vec::new());
            }
            let Some(nodes) = self.levels.get_mut(level) else {
                return;
            };
            nodes.push(node);
            let [.., left, right] = nodes.as_slice() else {
                return;
            };
            if nodes.len() % 2 == 1 {
                return;
            }
            node = Hash::node(*left, *right);
        }
    }

    /// Number of leaves.
    pub fn size(&self) -> u64 {
        self.levels.first().map_or(0, |leaves| leaves.len() as u64)
    }

    /// The leaf hash at a position.
    pub fn leaf(&self, index: u64) -> Option<Hash> {
        self.full(0, index)
    }

    /// The root of the first `size` leaves; none if there are not so many.
    pub fn root(&self, size: u64) -> Option<Hash> {
        if size == 0 {
            return Some(Hash::of(&[]));
        }
        self.hash(0, size)
    }

    /// Proof that the leaf at `index` is in the tree of the first `size` leaves, from the leaf's sibling upwards;
    /// none if it is not.
    pub fn inclusion(&self, index: u64, size: u64) -> Option<Vec<Hash>> {
        if index >= size || size > self.size() {
            return None;
        }
        let (mut from, mut to) = (0, size);
        let mut path = Vec::new();
        while to - from > 1 {
            let middle = from + left_half(to - from);
            if index < middle {
                path.push(self.hash(middle, to)?);
                to = middle;
            } else {
                path.push(self.hash(from, middle)?);
                from = middle;
            }
        }
        path.reverse();
        Some(path)
    }

    /// Proof that the tree of the first `old` leaves is the beginning of that of the first `size`; none if there are
    /// not so many. It is empty when the two are the same, and when `old` is 0.
    pub fn consistency(&self, old: u64, size: u64) -> Option<Vec<Hash>> {
        if old > size || size > self.size() {
            return None;
        }
        let (mut from, mut to) = (0, size);
        let mut path = Vec::new();
        if old == 0 {
            return Some(path);
        }
        while old != to {
            let middle = from + left_half(to - from);
            if old <= middle {
                path.push(self.hash(middle, to)?);
                to = middle;
            } else {
                path.push(self.hash(from, middle)?);
                from = middle;
            }
        }
        // The old tree's own last subtree is known to the verifier only if it is the whole old tree.
        if from > 0 {
            path.push(self.hash(from, to)?);
        }
        path.reverse();
        Some(path)
    }

    fn full(&self, level: u32, index: u64) -> Option<Hash> {
        let nodes = self.levels.get(usize::try_from(level).ok()?)?;
        nodes.get(usize::try_from(index).ok()?).copied()
    }

    /// MTH(D[from..to]), of a range that stands in the tree as a subtree does.
    fn hash(&self, from: u64, to: u64) -> Option<Hash> {
        let count = to - from;
        if count.is_power_of_two() {
            let level = count.trailing_zeros();
            return self.full(level, from >> level);
        }
        let middle = from + left_half(count);
        Some(Hash::node(self.hash(from, middle)?, self.hash(middle, to)?))
    }
}

/// The largest power of two below `count`, which is at least 2.
fn left_half(count: u64) -> u64 {
    1 << (u64::BITS - 1 - (count - 1).leading_zeros())
}

/// The root that a proof of inclusion leads to; none if it cannot be one.
pub fn root_of_inclusion(index: u64, size: u64, leaf: Hash, path: &[Hash]) -> Option<Hash> {
    if index >= size {
        return None;
    }
    let (mut node, mut last, mut root) = (index, size - 1, leaf);
    for sibling in path {
        if last == 0 {
            return None;
        }
        if node & 1 == 1 || node == last {
            root = Hash::node(*sibling, root);
            (node, last) = up_to_right_child(node, last);
        } else {
            root = Hash::node(root, *sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    (last == 0).then_some(root)
}

/// Whether a proof shows that the tree of `old` leaves is the beginning of that of `size`.
pub fn is_consistent(old: u64, old_root: Hash, size: u64, root: Hash, path: &[Hash]) -> bool {
    if old > size {
        return false;
    }
    if old == 0 {
        return path.is_empty() && old_root == Hash::of(&[]);
    }
    if old == size {
        return path.is_empty() && old_root == root;
    }
    let whole = old.is_power_of_two().then_some(old_root);
    let mut path = whole.iter().chain(path);
    let Some(first) = path.next() else {
        return false;
    };
    let shift = (old - 1).trailing_ones();
    let (mut node, mut last) = ((old - 1) >> shift, (size - 1) >> shift);
    let (mut of_old, mut of_new) = (*first, *first);
    for sibling in path {
        if last == 0 {
            return false;
        }
        if node & 1 == 1 || node == last {
            of_old = Hash::node(*sibling, of_old);
            of_new = Hash::node(*sibling, of_new);
            (node, last) = up_to_right_child(node, last);
        } else {
            of_new = Hash::node(of_new, *sibling);
        }
        node >>= 1;
        last >>= 1;
    }
    last == 0 && of_old == old_root && of_new == root
}

/// Goes up from a node without sibling until it is a right child, or the leftmost node.
fn up_to_right_child(node: u64, last: u64) -> (u64, u64) {
    let levels = if node == 0 { 0 } else { node.trailing_zeros() };
    (node >> levels, last >> levels)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leaf(index: u64) -> Hash {
        Hash::leaf(&index.to_be_bytes())
    }

    fn nodes(size: u64) -> Nodes {
        let mut nodes = Nodes::default();
        for index in 0..size {
            nodes.push(leaf(index));
        }
        nodes
    }

    /// RFC 6962 section 2.1, word by word.
    fn defined(leaves: &[Hash]) -> Hash {
        match leaves {
            [] => Hash::of(&[]),
            [leaf] => *leaf,
            _ => {
                let mut half = 1;
                while half * 2 < leaves.len() {
                    half *= 2;
                }
                Hash::node(defined(&leaves[..half]), defined(&leaves[half..]))
            }
        }
    }

    /// Roots of RFC 6962 trees over the leaves of the Certificate Transparency test data
    /// (transparency-dev/merkle, testonly/constants.go).
    #[test]
    fn the_tree_is_that_of_rfc_6962() {
        let leaves: [&[u8]; 8] = [
            b"",
            &[0x00],
            &[0x10],
            &[0x20, 0x21],
            &[0x30, 0x31],
            &[0x40, 0x41, 0x42, 0x43],
            &[0x50, 0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57],
            &[
                0x60, 0x61, 0x62, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6a, 0x6b, 0x6c, 0x6d, 0x6e,
                0x6f,
            ],
        ];
        let roots = [
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
            "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
            "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
            "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
            "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
            "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
        ];
        let (mut tree, mut nodes) = (Tree::default(), Nodes::default());
        assert_eq!(tree.root().to_string(), roots[0]);
        for (leaf, root) in leaves.iter().zip(&roots[1..]) {
            tree.push(Hash::leaf(leaf));
            nodes.push(Hash::leaf(leaf));
            assert_eq!(tree.root().to_string(), *root);
            assert_eq!(nodes.root(nodes.size()).unwrap(), tree.root());
        }
    }

    #[test]
    fn every_leaf_of_every_small_tree_is_proven_and_nothing_else_is() {
        let all = nodes(66);
        let leaves: Vec<Hash> = (0..66).map(leaf).collect();
        for size in 0..=66 {
            let root = all.root(size).unwrap();
            assert_eq!(root, defined(&leaves[..size as usize]));
            assert_eq!(all.inclusion(size, size), None);
            for index in 0..size {
                let path = all.inclusion(index, size).unwrap();
                assert_eq!(root_of_inclusion(index, size, leaf(index), &path), Some(root));
                assert_ne!(root_of_inclusion(index, size, leaf(index + 1), &path), Some(root));
                if size > 1 {
                    let short = &path[..path.len() - 1];
                    assert_ne!(root_of_inclusion(index, size, leaf(index), short), Some(root));
                    let other = (index + 1) % size;
                    assert_ne!(root_of_inclusion(other, size, leaf(index), &path), Some(root));
                }
                let long = [path.as_slice(), &[root]].concat();
                assert_eq!(root_of_inclusion(index, size, leaf(index), &long), None);
            }
        }
        assert_eq!(all.inclusion(3, 67), None);
    }

    #[test]
    fn every_small_tree_begins_every_larger_one_and_no_other_does() {
        let all = nodes(66);
        for size in 0..=66 {
            let root = all.root(size).unwrap();
            for old in 0..=size {
                let path = all.consistency(old, size).unwrap();
                let old_root = all.root(old).unwrap();
                assert!(is_consistent(old, old_root, size, root, &path), "{old} of {size}");
                let other = Hash::of(b"other");
                assert!(!is_consistent(old, other, size, root, &path));
                if old > 0 {
                    assert!(!is_consistent(old, old_root, size, other, &path));
                    let long = [path.as_slice(), &[root]].concat();
                    assert!(!is_consistent(old, old_root, size, root, &long));
                }
                for at in 0..path.len() {
                    let mut bad = path.clone();
                    bad[at].0[at] ^= 1;
                    assert!(!is_consistent(old, old_root, size, root, &bad));
                    let without = [&path[..at], &path[at + 1..]].concat();
                    assert!(!is_consistent(old, old_root, size, root, &without));
                }
                if old != size {
                    assert!(!is_consistent(size, root, old, old_root, &path));
                }
            }
        }
        assert_eq!(all.consistency(5, 67), None);
        assert_eq!(all.consistency(6, 5), None);
    }

    proptest! {
        #[test]
        fn proofs_of_large_trees_hold(size in 1_u64..5_000, at in any::<prop::sample::Index>()) {
            let all = nodes(size);
            let index = at.index(size as usize) as u64;
            let root = all.root(size).unwrap();
            let path = all.inclusion(index, size).unwrap();
            prop_assert_eq!(root_of_inclusion(index, size, leaf(index), &path), Some(root));
            let path = all.consistency(index, size).unwrap();
            prop_assert!(path.len() <= MAX_PROOF);
            prop_assert!(is_consistent(index, all.root(index).unwrap(), size, root, &path));
        }

        /// Numbers and hashes of anybody's making are answered, never a panic.
        #[test]
        fn any_input_is_answered(
            old in any::<u64>(),
            size in any::<u64>(),
            path in prop::collection::vec(any::<[u8; 32]>().prop_map(Hash), 0..70),
        ) {
            let root = Hash::of(b"root");
            prop_assert_ne!(root_of_inclusion(old, size, leaf(1), &path), Some(root));
            prop_assert!(!is_consistent(old, leaf(2), size, root, &path));
        }
    }
}
