// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";
import {ERC20Votes} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Votes.sol";
import {Nonces} from "@openzeppelin/contracts/utils/Nonces.sol";
import {Time} from "@openzeppelin/contracts/utils/types/Time.sol";

/// @title OpenToken: what rewards are paid in, Datanets stake and holders vote with
/// @notice ERC-20 with 18 decimals, permit (EIP-2612) and votes (EIP-5805). The supply is minted once; nobody can mint,
/// burn, pause or block an account.
/// @dev Votes are counted by time, not by block number: on a layer 2 the interval between blocks is not fixed.
contract OpenToken is ERC20, ERC20Permit, ERC20Votes {
    /// @param holder Receives the whole supply.
    /// @param supply Units of 10^-18 token; reverts with `ERC20ExceededSafeSupply` above 2^208 - 1.
    constructor(address holder, uint256 supply) ERC20("OpenLoRA", "OPEN") ERC20Permit("OpenLoRA") {
        _mint(holder, supply);
    }

    /// @notice The clock that votes are counted by: seconds since 1970.
    function clock() public view override returns (uint48) {
        return Time.timestamp();
    }

    /// @notice The clock's description as in EIP-6372.
    // solhint-disable-next-line func-name-mixedcase
    function CLOCK_MODE() public pure override returns (string memory) {
        return "mode=timestamp";
    }

    /// @notice The nonce that the next permit or delegation signed by `owner` has to carry.
    function nonces(address owner) public view override(ERC20Permit, Nonces) returns (uint256) {
        return super.nonces(owner);
    }

    function _update(address from, address to, uint256 value) internal override(ERC20, ERC20Votes) {
        super._update(from, to, value);
    }
}
