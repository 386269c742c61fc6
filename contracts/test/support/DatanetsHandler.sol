// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {DatanetRegistry} from "../../src/DatanetRegistry.sol";
import {Test} from "./Test.sol";
import {OddToken} from "./Tokens.sol";

/// Does to three Datanets whatever their parties can do, in any order, and keeps books of its own.
contract DatanetsHandler is Test {
    uint64 public constant DATANETS = 3;
    uint32 private constant BATCHES_MAX = 8;

    DatanetRegistry public immutable REGISTRY;
    OddToken public immutable TOKEN;
    address public immutable ADMIN;
    address public immutable ARBITER;

    uint256 public staked;
    uint256 public unstaked;
    uint256 public slashesPaid;
    uint256 public bondsIn;
    uint256 public bondsOut;
    uint256 public rejections;
    string public violation;

    constructor(DatanetRegistry registry, OddToken token, address admin, address arbiter) {
        (REGISTRY, TOKEN, ADMIN, ARBITER) = (registry, token, admin, arbiter);
        token.approve(address(registry), type(uint256).max);
        for (uint64 i = 0; i < DATANETS; ++i) {
            registry.createDatanet(0, 0);
        }
    }

    function commit(uint64 datanet) external {
        datanet = one(datanet);
        uint32 next = REGISTRY.getDatanet(datanet).batches + 1;
        if (next > BATCHES_MAX) return;
        REGISTRY.commitBatch(datanet, next, keccak256(abi.encode(datanet, next)), 1);
    }

    function stake(uint64 datanet, uint256 amount) external {
        amount = bound(amount, 1, 1e24);
        TOKEN.mint(address(this), amount);
        staked += REGISTRY.stake(one(datanet), amount);
    }

    function requestUnstake(uint64 datanet, uint256 amount) external {
        datanet = one(datanet);
        uint256 all = REGISTRY.getDatanet(datanet).stake;
        REGISTRY.requestUnstake(datanet, uint128(bound(amount, 0, all)));
    }

    function unstake(uint64 datanet) external {
        datanet = one(datanet);
        DatanetRegistry.Datanet memory d = REGISTRY.getDatanet(datanet);
        bool due = d.openDisputes == 0 && d.unstaking != 0 && block.timestamp >= d.unstakableAt;
        uint256 before = TOKEN.balanceOf(address(0xbeef));
        (bool ok,) = address(REGISTRY).call(abi.encodeCall(REGISTRY.unstake, (datanet, address(0xbeef))));
        if (ok != due) violation = "stake left at another time than it may";
        unstaked += TOKEN.balanceOf(address(0xbeef)) - before;
    }

    function dispute(uint64 datanet, uint32 batch, uint160 who) external {
        (datanet, batch) = (one(datanet), 1 + batch % BATCHES_MAX);
        if (stateOf(datanet, batch) != DatanetRegistry.BatchState.Committed) return;
        uint256 bond = REGISTRY.terms().bond;
        address disputer = actor(who);
        vm.deal(disputer, bond);
        vm.prank(disputer);
        REGISTRY.dispute{value: bond}(datanet, batch, 0);
        bondsIn += bond;
    }

    function resolve(uint64 datanet, uint32 batch, bool upheld, uint256 slash) external {
        (datanet, batch) = (one(datanet), 1 + batch % BATCHES_MAX);
        if (stateOf(datanet, batch) != DatanetRegistry.BatchState.Disputed) return;
        DatanetRegistry.Dispute memory open = REGISTRY.getDispute(datanet, batch);
        if (block.timestamp >= open.resolvableUntil) {
            REGISTRY.expire(datanet, batch);
            return;
        }
        slash = upheld ? bound(slash, 0, REGISTRY.getDatanet(datanet).stake) : 0;
        vm.prank(ARBITER);
        REGISTRY.resolve(datanet, batch, open.disputer, upheld, uint128(slash));
        if (upheld) rejections++;
    }

    function withdraw(uint256 which) external {
        address who = parties(which % 4);
        if (REGISTRY.bondCredit(who) != 0) {
            vm.prank(who);
            bondsOut += REGISTRY.withdrawBond(payable(address(0xdead)));
        }
        if (REGISTRY.slashCredit(who) != 0) {
            vm.prank(who);
            slashesPaid += REGISTRY.withdrawSlash(address(0xdead));
        }
    }

    function setTerms(uint96 bond) external {
        vm.prank(ADMIN);
        REGISTRY.setTerms(DatanetRegistry.Terms(bond, 3 hours, 1 hours));
    }

    function wait(uint256 duration) external {
        vm.warp(block.timestamp + bound(duration, 1 minutes, 2 hours));
    }

    /// Everybody who can have a credit.
    function parties(uint256 i) public view returns (address) {
        return i == 0 ? ADMIN : actor(i - 1);
    }

    function countOf(DatanetRegistry.BatchState state, uint64 datanet) public view returns (uint256 count) {
        for (uint32 b = 1; b <= BATCHES_MAX; ++b) {
            if (stateOf(datanet, b) == state) count++;
        }
    }

    function stateOf(uint64 datanet, uint32 batch) private view returns (DatanetRegistry.BatchState) {
        return REGISTRY.getBatch(datanet, batch).state;
    }

    function one(uint64 datanet) private pure returns (uint64) {
        return 1 + datanet % DATANETS;
    }

    function actor(uint256 seed) private pure returns (address) {
        return address(uint160(0xac70 + seed % 3));
    }
}
