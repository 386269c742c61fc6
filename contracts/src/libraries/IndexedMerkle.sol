// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Hashes} from "@openzeppelin/contracts/utils/cryptography/Hashes.sol";

/// @title IndexedMerkle: binary Merkle trees whose leaves have places
/// @dev Leaves are padded with zero words to a power of two; node = keccak256(left || right). Pairs are not sorted: the
/// index says on which side each sibling stands, so a proof is for one place and there is one encoding of it. What
/// can go wrong with Merkle trees cannot here:
/// - an inner node as a leaf: leaves are keccak256 of 32 bytes, nodes of 64, so one is never the preimage of the other;
/// - an odd leaf duplicated: the padding is zero, which no leaf hashes to, so a tree has no second reading;
/// - endless proofs or places: depth is at most 32 and an index must lie inside its depth.
library IndexedMerkle {
    /// @dev Room for 2^32 leaves.
    uint256 internal constant DEPTH_MAX = 32;

    error ProofTooLong(uint256 depth, uint256 depthMax);
    error IndexOutsideTree(uint256 index, uint256 depth);

    /// @notice The leaf for the encoded content of one entry. Hashed twice, so that its preimage has 32 bytes.
    function leafOf(bytes memory encoded) internal pure returns (bytes32) {
        return keccak256(bytes.concat(keccak256(encoded)));
    }

    /// @notice The root that `leaf` at `index` and its siblings, from the bottom up, lead to.
    function rootOf(bytes32 leaf, uint256 index, bytes32[] calldata proof) internal pure returns (bytes32 node) {
        uint256 depth = proof.length;
        if (depth > DEPTH_MAX) revert ProofTooLong(depth, DEPTH_MAX);
        if (index >> depth != 0) revert IndexOutsideTree(index, depth);
        node = leaf;
        for (uint256 level = 0; level < depth; ++level) {
            bytes32 sibling = proof[level];
            node = (index >> level) & 1 == 0
                ? Hashes.efficientKeccak256(node, sibling)
                : Hashes.efficientKeccak256(sibling, node);
        }
    }
}
