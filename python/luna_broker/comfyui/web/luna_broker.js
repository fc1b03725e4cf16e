// The sidebar tab "Broker": what the broker holds, saves and works on.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Sidebar } from "./sidebar.js";

const sidebar = new Sidebar(
  async (broker) => (await api.fetchApi(`/luna_broker/status?broker=${encodeURIComponent(broker)}`)).json(),
  () => addresses(app.graph),
);

app.registerExtension({
  name: "LunaBroker.Sidebar",
  setup() {
    // Frontends from before sidebars have no such tab, and everything else works.
    app.extensionManager?.registerSidebarTab?.({
      id: "luna-broker",
      icon: "pi pi-share-alt",
      title: "Broker",
      tooltip: "Luna Broker: models, memory saved, lanes and sessions",
      type: "custom",
      render: (element) => sidebar.show(element),
      destroy: () => sidebar.hide(),
    });
  },
});

// The brokers that the nodes of the workflow name.
function addresses(graph) {
  const widgets = (graph?.nodes ?? []).flatMap((node) => node.widgets ?? []);
  const named = widgets.filter((widget) => widget.name === "broker").map((widget) => String(widget.value).trim());
  return [...new Set(named)].filter(Boolean);
}
