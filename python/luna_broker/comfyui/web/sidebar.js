// When the broker is asked, and where the answer goes. Knows nothing of ComfyUI.
import { h } from "./elements.js";
import { absent, overview } from "./panel.js";
import { STYLE } from "./style.js";

const PAUSE_MS = 2000;
const REMEMBERED = "luna-broker.address";

export class Sidebar {
  #ask;
  #addresses;
  #element = null;
  #body = null;
  #timer = null;
  #round = 0;

  // ask: address => promise of the answer; addresses: () => the ones to choose from.
  constructor(ask, addresses) {
    this.#ask = ask;
    this.#addresses = addresses;
    document.addEventListener("visibilitychange", () => this.#refresh());
  }

  // May be called again for an element that is shown already.
  show(element) {
    if (element === this.#element) return;
    this.#element = element;
    this.#body = h("div", { className: "luna-body" });
    element.replaceChildren(h("div", { className: "luna-broker" }, h("style", {}, STYLE), this.#header(), this.#body));
    this.#refresh();
  }

  hide() {
    this.#element = null;
    clearTimeout(this.#timer);
  }

  get #isVisible() {
    return this.#element !== null && !document.hidden;
  }

  get #address() {
    return localStorage.getItem(REMEMBERED) ?? "";
  }

  #header() {
    const choices = h("datalist", { id: "luna-addresses" });
    const address = h("input", {
      value: this.#address,
      placeholder: "default broker",
      title: "The broker's socket, or one for each service (vae=PATH,unet=PATH); empty for the default one",
      onfocus: () => choices.replaceChildren(...this.#addresses().map((value) => h("option", { value }))),
      onchange: () => {
        localStorage.setItem(REMEMBERED, address.value.trim());
        this.#refresh();
      },
    });
    address.setAttribute("list", choices.id);
    return h("header", {}, h("h2", {}, "Luna Broker"), address, choices);
  }

  async #refresh() {
    clearTimeout(this.#timer);
    if (!this.#isVisible) return;
    const round = ++this.#round;
    let drawn;
    try {
      const answer = await this.#ask(this.#address);
      drawn = answer.error ? [absent(answer.error)] : answer.brokers.map(overview);
    } catch (error) {
      drawn = [absent({ message: `ComfyUI does not answer: ${error.message}`, remedy: "see whether it still runs" })];
    }
    // Another question was asked meanwhile: its answer counts.
    if (round !== this.#round || this.#element === null) return;
    this.#body.replaceChildren(...drawn);
    this.#timer = setTimeout(() => this.#refresh(), PAUSE_MS);
  }
}
