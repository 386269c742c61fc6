// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {DatanetRegistry} from "../src/DatanetRegistry.sol";
import {RewardSettlement} from "../src/RewardSettlement.sol";
import {IndexedMerkle} from "../src/libraries/IndexedMerkle.sol";
import {Test} from "./support/Test.sol";
import {Tree} from "./support/Tree.sol";

/// The tree's format: equal to the vectors of another implementation, and without the known holes of Merkle trees.
contract IndexedMerkleTest is Test {
    string private vectors;
    RewardSettlement private settlement;

    function setUp() public {
        vectors = vm.readFile("test/vectors/merkle.json");
        vm.chainId(vm.parseJsonUint(vectors, ".chainId"));
        IERC20 token = IERC20(vm.parseJsonAddress(vectors, ".token"));
        settlement = RewardSettlement(vm.parseJsonAddress(vectors, ".settlement"));
        RewardSettlement deployed =
            new RewardSettlement(token, address(1), address(0), address(0), RewardSettlement.Terms(0, 1, 1));
        vm.etch(address(settlement), address(deployed).code);
    }

    /// Through calldata, as the library wants its proofs.
    function rootOf(bytes32 leaf, uint256 index, bytes32[] calldata proof) external pure returns (bytes32) {
        return IndexedMerkle.rootOf(leaf, index, proof);
    }

    function test_leaves_roots_and_proofs_equal_the_vectors() public view {
        vm.assertEq(settlement.LEAF_DOMAIN(), vm.parseJsonBytes32(vectors, ".leafDomain"));
        uint256 cases = 0;
        for (string memory path = caseAt(0); vm.keyExistsJson(vectors, path); path = caseAt(++cases)) {
            checkCase(path);
        }
        vm.assertEq(cases, 7);
    }

    function test_a_million_accounts_have_proofs_of_twenty_siblings() public view {
        bytes32 root = vm.parseJsonBytes32(vectors, ".large.root");
        for (uint256 i = 0; i < 4; ++i) {
            string memory path = string.concat(".large.proofs[", vm.toString(i), "]");
            uint256 index = vm.parseJsonUint(vectors, string.concat(path, ".index"));
            bytes32 leaf = settlement.leafHash(address(uint160(index + 1)), (index + 1) * 1e12);
            bytes32[] memory proof = vm.parseJsonBytes32Array(vectors, string.concat(path, ".proof"));
            vm.assertEq(proof.length, 20);
            vm.assertEq(this.rootOf(leaf, index, proof), root);
        }
    }

    function test_contributions_equal_the_vectors() public {
        DatanetRegistry deployed =
            new DatanetRegistry(IERC20(address(1)), address(1), address(0), DatanetRegistry.Terms(0, 1, 0));
        DatanetRegistry registry = DatanetRegistry(vm.parseJsonAddress(vectors, ".contributions.registry"));
        vm.etch(address(registry), address(deployed).code);
        vm.assertEq(registry.LEAF_DOMAIN(), vm.parseJsonBytes32(vectors, ".contributionDomain"));
        address[] memory contributors = vm.parseJsonAddressArray(vectors, ".contributions.contributors");
        bytes32[] memory contents = vm.parseJsonBytes32Array(vectors, ".contributions.contents");
        bytes32[] memory leaves = new bytes32[](contents.length);
        for (uint256 i = 0; i < contents.length; ++i) {
            leaves[i] = registry.contributionLeaf(7, contributors[i], contents[i]);
        }
        checkTree(".contributions", leaves);
    }

    function test_a_signed_claims_digest_equals_the_vectors() public view {
        vm.assertEq(settlement.CLAIM_TYPEHASH(), vm.parseJsonBytes32(vectors, ".claimFor.typeHash"));
        vm.assertEq(settlement.domainSeparator(), vm.parseJsonBytes32(vectors, ".claimFor.domainSeparator"));
        bytes32 structHash = keccak256(
            abi.encode(
                settlement.CLAIM_TYPEHASH(),
                vm.parseJsonAddress(vectors, ".claimFor.account"),
                vm.parseJsonAddress(vectors, ".claimFor.recipient"),
                vm.parseJsonUint(vectors, ".claimFor.cumulative"),
                vm.parseJsonUint(vectors, ".claimFor.nonce"),
                vm.parseJsonUint(vectors, ".claimFor.deadline")
            )
        );
        vm.assertEq(
            keccak256(abi.encodePacked(hex"1901", settlement.domainSeparator(), structHash)),
            vm.parseJsonBytes32(vectors, ".claimFor.digest")
        );
    }

    function testFuzz_every_leaf_leads_to_the_root(bytes32[] memory leaves) public view {
        uint256 count = bound(leaves.length, 1, 64);
        bytes32[] memory kept = new bytes32[](count);
        for (uint256 i = 0; i < count; ++i) {
            kept[i] = i < leaves.length ? leaves[i] : keccak256(abi.encode(i));
        }
        bytes32 root = Tree.root(kept);
        for (uint256 i = 0; i < count; ++i) {
            vm.assertEq(this.rootOf(kept[i], i, Tree.proof(kept, i)), root);
        }
    }

    /// A node has a preimage of 64 bytes and a leaf one of 32, so a node's hash is no leaf's for any content.
    function testFuzz_an_inner_node_is_no_leaf(uint256[4] memory amounts, address account, uint256 cumulative)
        public
        view
    {
        bytes32[] memory leaves = new bytes32[](4);
        for (uint256 i = 0; i < 4; ++i) {
            leaves[i] = settlement.leafHash(address(uint160(i + 1)), amounts[i]);
        }
        bytes32 left = keccak256(abi.encode(leaves[0], leaves[1]));
        bytes32 right = keccak256(abi.encode(leaves[2], leaves[3]));
        bytes32 root = keccak256(abi.encode(left, right));
        // The library folds what it is given; that a node is never given is the leaf's form.
        bytes32[] memory shortened = new bytes32[](1);
        shortened[0] = right;
        vm.assertEq(this.rootOf(left, 0, shortened), root);
        bytes32 leaf = settlement.leafHash(account, cumulative);
        vm.assertTrue(leaf != left && leaf != right && leaf != root, "no leaf hashes like a node");
        // The old attack reads the two children as a leaf's content: 64 bytes hashed once.
        vm.assertTrue(IndexedMerkle.leafOf(abi.encode(leaves[0], leaves[1])) != left, "leaves are hashed twice");
    }

    /// Three leaves and the same with the last one repeated have the same root where odd leaves are duplicated. Not here.
    function testFuzz_repeating_the_last_leaf_makes_another_tree(bytes32 a, bytes32 b, bytes32 c) public view {
        vm.assume(c != 0);
        bytes32[] memory three = new bytes32[](3);
        (three[0], three[1], three[2]) = (a, b, c);
        bytes32[] memory four = new bytes32[](4);
        (four[0], four[1], four[2], four[3]) = (a, b, c, c);
        vm.assertTrue(Tree.root(three) != Tree.root(four), "padding is zero");
        vm.assertTrue(this.rootOf(c, 3, Tree.proof(three, 3)) != Tree.root(three), "the padding's place is not c's");
    }

    /// A proof is for one place: the same siblings from another place lead elsewhere.
    function testFuzz_a_place_is_part_of_the_proof(bytes32[8] memory given, uint8 index, uint8 other) public view {
        bytes32[] memory leaves = new bytes32[](8);
        for (uint256 i = 0; i < 8; ++i) {
            leaves[i] = keccak256(abi.encode(given[i], i));
        }
        index %= 8;
        other %= 8;
        vm.assume(index != other);
        bytes32[] memory proof = Tree.proof(leaves, index);
        vm.assertTrue(this.rootOf(leaves[index], other, proof) != Tree.root(leaves), "another place, another root");
    }

    /// Another implementation judges what is drawn here and what comes of it (settlement/tests/agreement.rs). A line has chain id,
    /// settlement, token, account, cumulative, index, leaf, root, siblings.
    function testFuzz_what_is_drawn_is_written_down(
        address account,
        uint128 cumulative,
        uint8 index,
        bytes32[8] memory siblings,
        uint8 depth
    ) public {
        bytes32[] memory proof = new bytes32[](depth % 9);
        for (uint256 i = 0; i < proof.length; ++i) {
            proof[i] = siblings[i];
        }
        uint256 place = index % (uint256(1) << proof.length);
        bytes32 leaf = settlement.leafHash(account, cumulative);
        string memory line = string.concat(vm.toString(block.chainid), " ", vm.toString(address(settlement)));
        line = string.concat(line, " ", vm.toString(address(settlement.TOKEN())), " ", vm.toString(account));
        line = string.concat(line, " ", vm.toString(uint256(cumulative)), " ", vm.toString(place));
        line = string.concat(line, " ", vm.toString(leaf), " ", vm.toString(this.rootOf(leaf, place, proof)));
        for (uint256 i = 0; i < proof.length; ++i) {
            line = string.concat(line, " ", vm.toString(proof[i]));
        }
        vm.writeLine("cache/fuzzed.txt", line);
    }

    function testFuzz_depth_and_place_are_bounded(bytes32 leaf, uint256 index, uint8 depth) public {
        bytes32[] memory proof = new bytes32[](depth);
        if (depth > 32) {
            vm.expectRevert(abi.encodeWithSelector(IndexedMerkle.ProofTooLong.selector, depth, 32));
        } else {
            index = bound(index, uint256(1) << depth, type(uint256).max);
            vm.expectRevert(abi.encodeWithSelector(IndexedMerkle.IndexOutsideTree.selector, index, depth));
        }
        this.rootOf(leaf, index, proof);
    }

    function test_the_deepest_tree_has_a_first_and_a_last_place() public view {
        bytes32[] memory proof = new bytes32[](32);
        bytes32 first = this.rootOf(bytes32(uint256(1)), 0, proof);
        vm.assertTrue(first != this.rootOf(bytes32(uint256(1)), type(uint32).max, proof), "both are in the tree");
    }

    function checkCase(string memory path) private view {
        address[] memory accounts = vm.parseJsonAddressArray(vectors, string.concat(path, ".accounts"));
        uint256[] memory amounts = vm.parseJsonUintArray(vectors, string.concat(path, ".cumulative"));
        bytes32[] memory leaves = new bytes32[](accounts.length);
        for (uint256 i = 0; i < accounts.length; ++i) {
            leaves[i] = settlement.leafHash(accounts[i], amounts[i]);
        }
        checkTree(path, leaves);
    }

    function checkTree(string memory path, bytes32[] memory leaves) private view {
        bytes32 root = vm.parseJsonBytes32(vectors, string.concat(path, ".root"));
        vm.assertEq(Tree.root(leaves), root, path);
        for (uint256 i = 0; i < leaves.length; ++i) {
            string memory one = string.concat(path, ".proofs[", vm.toString(i), "]");
            bytes32[] memory proof = vm.parseJsonBytes32Array(vectors, string.concat(one, ".proof"));
            vm.assertEq(leaves[i], vm.parseJsonBytes32(vectors, string.concat(one, ".leaf")), one);
            vm.assertEq(this.rootOf(leaves[i], i, proof), root, one);
            vm.assertEq(keccak256(abi.encode(proof)), keccak256(abi.encode(Tree.proof(leaves, i))), one);
        }
    }

    function caseAt(uint256 i) private pure returns (string memory) {
        return string.concat(".payouts[", vm.toString(i), "]");
    }
}
