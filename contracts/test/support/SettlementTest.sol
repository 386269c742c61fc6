// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {RewardSettlement} from "../../src/RewardSettlement.sol";
import {OddToken} from "./Tokens.sol";
import {Test} from "./Test.sol";
import {Tree} from "./Tree.sol";

/// A settlement with 1,000,000 units in it, its parties, and short words for what they do.
abstract contract SettlementTest is Test {
    uint96 internal constant BOND = 1 ether;
    uint32 internal constant WINDOW = 1 days;
    uint32 internal constant ARBITRATION = 3 days;
    uint256 internal constant FUNDS = 1_000_000;
    bytes32 internal constant RECEIPTS = keccak256("receipts");
    bytes32 internal constant MANIFEST = keccak256("manifest");

    address internal admin = address(0xad);
    address internal proposer = address(0xb0);
    address internal arbiter = address(0xa6);
    address internal challenger = address(0xc4);
    address internal anyone = address(0xee);

    OddToken internal token;
    RewardSettlement internal settlement;

    function setUp() public virtual {
        vm.warp(1_800_000_000);
        token = new OddToken();
        settlement = new RewardSettlement(
            IERC20(address(token)), admin, proposer, arbiter, RewardSettlement.Terms(BOND, WINDOW, ARBITRATION)
        );
        token.mint(address(settlement), FUNDS);
        vm.deal(proposer, 100 ether);
        vm.deal(challenger, 100 ether);
    }

    function propose(uint64 epoch, bytes32 root, uint256 total) internal {
        vm.prank(proposer);
        settlement.propose{value: BOND}(epoch, root, RECEIPTS, total, MANIFEST);
    }

    function challenge(uint64 epoch, bytes32 root) internal {
        vm.prank(challenger);
        settlement.challenge{value: BOND}(epoch, root, keccak256("evidence"));
    }

    function resolve(uint64 epoch, bytes32 root, bool upheld) internal {
        vm.prank(arbiter);
        settlement.resolve(epoch, root, upheld);
    }

    function passWindow() internal {
        vm.warp(block.timestamp + WINDOW);
    }

    function settle(uint64 epoch, bytes32 root, uint256 total) internal {
        propose(epoch, root, total);
        passWindow();
        settlement.finalize(epoch, root);
    }

    /// Leaves of accounts 0x1001, 0x1002, ... with these cumulative amounts.
    function leavesOf(uint256[] memory amounts) internal view returns (bytes32[] memory leaves) {
        leaves = new bytes32[](amounts.length);
        for (uint256 i = 0; i < amounts.length; ++i) {
            leaves[i] = settlement.leafHash(accountAt(i), amounts[i]);
        }
    }

    function settleAmounts(uint64 epoch, uint256[] memory amounts) internal {
        uint256 total = 0;
        for (uint256 i = 0; i < amounts.length; ++i) {
            total += amounts[i];
        }
        settle(epoch, Tree.root(leavesOf(amounts)), total);
    }

    function entryOf(uint64 epoch, uint256[] memory amounts, uint256 index)
        internal
        view
        returns (RewardSettlement.Claim memory)
    {
        bytes32[] memory proof = Tree.proof(leavesOf(amounts), index);
        return RewardSettlement.Claim(epoch, accountAt(index), amounts[index], index, proof);
    }

    function accountAt(uint256 index) internal pure returns (address) {
        return address(uint160(0x1001 + index));
    }

    function amounts3(uint256 a, uint256 b, uint256 c) internal pure returns (uint256[] memory amounts) {
        amounts = new uint256[](3);
        (amounts[0], amounts[1], amounts[2]) = (a, b, c);
    }

    function status() internal view returns (RewardSettlement.Status) {
        return settlement.proposal().status;
    }
}
