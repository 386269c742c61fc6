// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {TimelockController} from "@openzeppelin/contracts/governance/TimelockController.sol";
import {IVotes} from "@openzeppelin/contracts/governance/utils/IVotes.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {DatanetRegistry} from "../../src/DatanetRegistry.sol";
import {ModelRegistry} from "../../src/ModelRegistry.sol";
import {OpenGovernor} from "../../src/OpenGovernor.sol";
import {OpenToken} from "../../src/OpenToken.sol";
import {RewardSettlement} from "../../src/RewardSettlement.sol";

/// Everything deployed in the order, and with the hand-over, that docs/contracts.md describes.
/// At the end the deployer holds no role anywhere.
contract Deployment {
    uint256 public constant DELAY = 2 days;
    uint48 public constant VOTING_DELAY = 1 days;
    uint32 public constant VOTING_PERIOD = 7 days;

    OpenToken public immutable TOKEN;
    TimelockController public immutable TIMELOCK;
    OpenGovernor public immutable GOVERNOR;
    RewardSettlement public immutable SETTLEMENT;
    DatanetRegistry public immutable DATANETS;
    ModelRegistry public immutable MODELS;

    constructor(address holder, uint256 supply, address operator, address arbiter) {
        TOKEN = new OpenToken(holder, supply);
        address[] memory nobody = new address[](0);
        address[] memory anybody = new address[](1);
        TIMELOCK = new TimelockController(DELAY, nobody, anybody, address(this));
        GOVERNOR = new OpenGovernor(IVotes(address(TOKEN)), TIMELOCK, VOTING_DELAY, VOTING_PERIOD, supply / 1000, 4);
        SETTLEMENT = new RewardSettlement(
            IERC20(address(TOKEN)),
            address(TIMELOCK),
            operator,
            arbiter,
            RewardSettlement.Terms(1 ether, 1 days, 14 days)
        );
        DATANETS = new DatanetRegistry(
            IERC20(address(TOKEN)), address(TIMELOCK), arbiter, DatanetRegistry.Terms(0.1 ether, 14 days, 7 days)
        );
        MODELS = new ModelRegistry(DATANETS, address(TIMELOCK), operator);

        TIMELOCK.grantRole(TIMELOCK.PROPOSER_ROLE(), address(GOVERNOR));
        TIMELOCK.grantRole(TIMELOCK.CANCELLER_ROLE(), address(GOVERNOR));
        TIMELOCK.renounceRole(TIMELOCK.DEFAULT_ADMIN_ROLE(), address(this));
    }
}
