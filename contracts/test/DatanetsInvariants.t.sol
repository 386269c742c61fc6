// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {DatanetRegistry} from "../src/DatanetRegistry.sol";
import {DatanetsHandler} from "./support/DatanetsHandler.sol";
import {Test} from "./support/Test.sol";
import {OddToken} from "./support/Tokens.sol";

/// Stakes and bonds, whatever the parties do, in whatever order.
contract DatanetsInvariantsTest is Test {
    OddToken private token;
    DatanetRegistry private registry;
    DatanetsHandler private handler;

    function setUp() public {
        vm.warp(1_800_000_000);
        token = new OddToken();
        registry = new DatanetRegistry(
            IERC20(address(token)), address(0xad), address(0xa6), DatanetRegistry.Terms(1 ether, 3 hours, 1 hours)
        );
        handler = new DatanetsHandler(registry, token, address(0xad), address(0xa6));
    }

    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    function invariant_every_staked_unit_is_here_returned_or_slashed() public view {
        uint256 owed = 0;
        for (uint64 d = 1; d <= handler.DATANETS(); ++d) {
            DatanetRegistry.Datanet memory datanet = registry.getDatanet(d);
            vm.assertLe(datanet.unstaking, datanet.stake, "unstaking <= stake");
            owed += datanet.stake;
        }
        for (uint256 i = 0; i < 4; ++i) {
            owed += registry.slashCredit(handler.parties(i));
        }
        vm.assertEq(token.balanceOf(address(registry)), owed, "every unit is somebody's");
        vm.assertEq(owed, handler.staked() - handler.unstaked() - handler.slashesPaid(), "in less out");
    }

    function invariant_bonds_are_conserved() public view {
        uint256 owed = 0;
        for (uint256 i = 0; i < 4; ++i) {
            owed += registry.bondCredit(handler.parties(i));
        }
        for (uint64 d = 1; d <= handler.DATANETS(); ++d) {
            for (uint32 b = 1; b <= 8; ++b) {
                owed += registry.getDispute(d, b).bond;
            }
        }
        vm.assertEq(address(registry).balance, owed, "every wei is somebody's");
        vm.assertEq(owed, handler.bondsIn() - handler.bondsOut(), "in less out");
    }

    function invariant_open_disputes_are_counted_and_rejections_are_for_good() public view {
        uint256 rejected = 0;
        for (uint64 d = 1; d <= handler.DATANETS(); ++d) {
            uint256 open = handler.countOf(DatanetRegistry.BatchState.Disputed, d);
            vm.assertEq(registry.getDatanet(d).openDisputes, open);
            rejected += handler.countOf(DatanetRegistry.BatchState.Rejected, d);
        }
        vm.assertEq(rejected, handler.rejections());
    }

    function invariant_nothing_happened_that_must_not() public view {
        vm.assertEq(keccak256(bytes(handler.violation())), keccak256(""), handler.violation());
    }
}
