// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// A token that behaves until it is told not to.
contract OddToken is ERC20("Odd", "ODD") {
    /// Tenths of a percent that do not arrive.
    uint256 public feePermille;
    bool public returnsFalse;
    bool public returnsNothing;
    mapping(address account => bool) public blocked;
    /// Called in the middle of each transfer, before balances move; not by transfers that the call itself makes.
    address public callee;
    bytes public callData;
    bool public calleeSucceeded;
    bool private calling;

    error Blocked(address account);

    function mint(address to, uint256 amount) external {
        _mint(to, amount);
    }

    function burn(address from, uint256 amount) external {
        _burn(from, amount);
    }

    function setFee(uint256 permille) external {
        feePermille = permille;
    }

    function setReturnsFalse(bool value) external {
        returnsFalse = value;
    }

    function setReturnsNothing(bool value) external {
        returnsNothing = value;
    }

    function setBlocked(address account, bool value) external {
        blocked[account] = value;
    }

    function setCall(address to, bytes calldata data) external {
        (callee, callData) = (to, data);
    }

    function transfer(address to, uint256 amount) public override returns (bool) {
        if (returnsFalse) return false;
        super.transfer(to, amount);
        if (returnsNothing) {
            assembly {
                return(0, 0)
            }
        }
        return true;
    }

    function _update(address from, address to, uint256 amount) internal override {
        if (blocked[to]) revert Blocked(to);
        if (callee != address(0) && !calling) {
            calling = true;
            (calleeSucceeded,) = callee.call(callData);
            calling = false;
        }
        uint256 fee = from == address(0) || to == address(0) ? 0 : amount * feePermille / 1000;
        if (fee != 0) super._update(from, address(this), fee);
        super._update(from, to, amount - fee);
    }
}

/// A party that cannot be paid in the chain's coin until it says so.
contract Refuser {
    bool public accepts;

    error Refused();

    function setAccepts(bool value) external {
        accepts = value;
    }

    function perform(address to, uint256 value, bytes calldata data) external returns (bytes memory) {
        (bool ok, bytes memory result) = to.call{value: value}(data);
        if (!ok) {
            assembly {
                revert(add(result, 32), mload(result))
            }
        }
        return result;
    }

    receive() external payable {
        if (!accepts) revert Refused();
    }
}

/// A contract account that signs by EIP-1271: whatever digest it was told to accept.
contract Wallet {
    mapping(bytes32 digest => bool) public accepted;
    bool public acceptsAll;

    function accept(bytes32 digest) external {
        accepted[digest] = true;
    }

    function acceptAll() external {
        acceptsAll = true;
    }

    function isValidSignature(bytes32 digest, bytes calldata) external view returns (bytes4) {
        return acceptsAll || accepted[digest] ? this.isValidSignature.selector : bytes4(0xffffffff);
    }
}
