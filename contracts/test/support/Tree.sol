// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

/// A payout tree in memory, built as docs/contracts.md says: padded with zero words to a power of two, siblings in place.
library Tree {
    function root(bytes32[] memory leaves) internal pure returns (bytes32) {
        bytes32[] memory level = padded(leaves, depthOf(leaves.length));
        while (level.length > 1) level = above(level);
        return level[0];
    }

    /// Siblings of the leaf at `index`, from the bottom up.
    function proof(bytes32[] memory leaves, uint256 index) internal pure returns (bytes32[] memory siblings) {
        uint256 depth = depthOf(leaves.length);
        siblings = new bytes32[](depth);
        bytes32[] memory level = padded(leaves, depth);
        for (uint256 i = 0; i < depth; ++i) {
            siblings[i] = level[(index >> i) ^ 1];
            level = above(level);
        }
    }

    function depthOf(uint256 count) internal pure returns (uint256 depth) {
        while ((uint256(1) << depth) < count) ++depth;
    }

    function padded(bytes32[] memory leaves, uint256 depth) private pure returns (bytes32[] memory level) {
        level = new bytes32[](uint256(1) << depth);
        for (uint256 i = 0; i < leaves.length; ++i) {
            level[i] = leaves[i];
        }
    }

    function above(bytes32[] memory level) private pure returns (bytes32[] memory parents) {
        parents = new bytes32[](level.length / 2);
        for (uint256 i = 0; i < parents.length; ++i) {
            parents[i] = keccak256(abi.encode(level[2 * i], level[2 * i + 1]));
        }
    }
}
