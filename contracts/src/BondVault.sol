// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";

/// @title BondVault: bonds in the chain's own coin that are pulled, never pushed
/// @notice A decision only writes down whose a bond is. Whoever cannot or does not want to receive it stops nobody else.
/// @dev Amounts are in wei. Nothing in here accepts coins by itself: a bond comes with the call that needs it.
abstract contract BondVault is ReentrancyGuardTransient {
    /// @notice Where the half of a forfeited bond goes that the winner does not get: then a proposer who challenges
    /// himself to get ahead of an honest challenger still loses.
    address public immutable TREASURY;

    /// @notice Wei that `account` can withdraw.
    mapping(address account => uint256) public bondCredit;

    event BondCredited(address indexed account, uint256 amount);
    event BondWithdrawn(address indexed account, address indexed to, uint256 amount);

    error WrongBond(uint256 given, uint256 required);
    error NoBondCredit(address account);
    error BondTransferFailed(address to, uint256 amount);
    error ZeroAddress();

    constructor(address treasury) {
        if (treasury == address(0)) revert ZeroAddress();
        TREASURY = treasury;
    }

    /// @notice Sends everything credited to the caller to `to`. Reverts with `NoBondCredit` where there is nothing and
    /// with `BondTransferFailed` where `to` refuses it; the credit then stays.
    /// @return amount Wei sent.
    function withdrawBond(address payable to) external nonReentrant returns (uint256 amount) {
        if (to == address(0)) revert ZeroAddress();
        amount = bondCredit[msg.sender];
        if (amount == 0) revert NoBondCredit(msg.sender);
        bondCredit[msg.sender] = 0;
        emit BondWithdrawn(msg.sender, to, amount);
        (bool sent,) = to.call{value: amount}("");
        if (!sent) revert BondTransferFailed(to, amount);
    }

    function _creditBond(address account, uint256 amount) internal {
        if (amount == 0) return;
        bondCredit[account] += amount;
        emit BondCredited(account, amount);
    }

    /// @dev Shares out a forfeited bond: half to the winner, the rest, and the odd wei, to the treasury.
    function _forfeitBond(address winner, uint256 amount) internal {
        uint256 half = amount / 2;
        _creditBond(winner, half);
        _creditBond(TREASURY, amount - half);
    }
}
